"""The system calls that a qemu-storage-daemon never needs, and by which one that was taken over would go further.

What it does need depends on how it was built and on its C library, so that is not listed. io_uring is refused, too,
which the daemon then does without; clone3 is, since a filter cannot look at its flags, and the C library calls clone.
"""

from katapod.plan.call_filter import CallFilter, CallRule

__all__ = ["DISK_CALLS"]

NEW_NAMESPACES = 0x7E020000  # CLONE_NEW...
AF_UNIX = 1
PR_SET_NAME, PR_SET_TIMERSLACK = 15, 29  # not PR_SET_PDEATHSIG, by which it could outlive its supervisor

DISK_CALLS = CallFilter(
    rules=(
        CallRule("clone", 56, 0, (0,), NEW_NAMESPACES),
        CallRule("prctl", 157, 0, (PR_SET_NAME, PR_SET_TIMERSLACK)),
        CallRule("socket", 41, 0, (AF_UNIX,)),
    ),
    refused=(
        *(("ptrace", 101), ("process_vm_readv", 310), ("process_vm_writev", 311), ("kcmp", 312), ("pidfd_getfd", 438)),
        *(("unshare", 272), ("setns", 308), ("clone3", 435), ("chroot", 161), ("pivot_root", 155)),
        *(("mount", 165), ("umount2", 166), ("open_tree", 428), ("move_mount", 429), ("fsopen", 430)),
        *(("fsconfig", 431), ("fsmount", 432), ("fspick", 433), ("mount_setattr", 442)),
        *(("mknod", 133), ("mknodat", 259), ("name_to_handle_at", 303), ("open_by_handle_at", 304)),
        *(("add_key", 248), ("request_key", 249), ("keyctl", 250), ("bpf", 321), ("perf_event_open", 298)),
        *(("userfaultfd", 323), ("io_uring_setup", 425), ("io_uring_enter", 426), ("io_uring_register", 427)),
        *(("init_module", 175), ("finit_module", 313), ("delete_module", 176), ("kexec_load", 246)),
        *(("kexec_file_load", 320), ("reboot", 169), ("swapon", 167), ("swapoff", 168), ("acct", 163)),
        *(("quotactl", 179), ("syslog", 103), ("personality", 135), ("modify_ldt", 154), ("iopl", 172)),
        *(("ioperm", 173), ("fanotify_init", 300), ("move_pages", 279), ("migrate_pages", 256)),
    ),
)
