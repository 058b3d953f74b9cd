"""The system calls that a virtiofsd never needs, not even to make its own sandbox, and by which one that was taken over
would go further.

Its own sandbox has a list of the calls that it needs to serve, and kills it for all others. That list looks at no
arguments: a thread may unshare what it has in common with the others, and with the same call make a user namespace, in
which it has all capabilities. What the sandbox is made with, a list of ours has to let pass, since it is there before
the program is: so it cannot be shorter, but comes on top with what is refused.

clone3 fails, since a filter cannot look at its flags, and the C library calls clone then. What takes one of the
arguments that an administrator may add (virtio_fs_extra_args) stays: chroot, and handles of files, which take a
capability that it has by such an argument only.

sched_setattr and sched_getattr are refused for another reason: GLib 2.74, by which the one in C works, gives each new
thread of a pool the nice value that the pool began with. Without CAP_SYS_NICE that fails where somebody has put the
process behind others since (renice); GLib warns of it, looks first whether stderr is a socket (getpeername), and the
daemon's own list kills it for that. Where the value cannot be asked for, threads have that of who makes them.

Sources: QEMU's tools/virtiofsd/passthrough_seccomp.c, virtiofsd's src/seccomp.rs and src/sandbox.rs, linux/sched.h.
"""

from katapod.plan.call_filter import CallFilter, CallRule

__all__ = ["VIRTIOFSD_CALLS"]

CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER = 0x02000000, 0x04000000, 0x08000000, 0x10000000
UNUSED_NAMESPACES = CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER
AF_UNIX = 1  # of syslog(3)

VIRTIOFSD_CALLS = CallFilter(
    rules=(
        CallRule("clone", 56, 0, (0,), UNUSED_NAMESPACES),
        CallRule("socket", 41, 0, (AF_UNIX,)),
        CallRule("unshare", 272, 0, (0,), UNUSED_NAMESPACES),
    ),
    refused=(
        *(("ptrace", 101), ("process_vm_readv", 310), ("process_vm_writev", 311), ("kcmp", 312), ("pidfd_getfd", 438)),
        *(("setns", 308), ("clone3", 435), ("open_tree", 428), ("move_mount", 429), ("fsopen", 430)),
        *(("fsconfig", 431), ("fsmount", 432), ("fspick", 433), ("mount_setattr", 442)),
        *(("add_key", 248), ("request_key", 249), ("keyctl", 250), ("bpf", 321), ("perf_event_open", 298)),
        *(("userfaultfd", 323), ("io_uring_setup", 425), ("io_uring_enter", 426), ("io_uring_register", 427)),
        *(("init_module", 175), ("finit_module", 313), ("delete_module", 176), ("kexec_load", 246)),
        *(("kexec_file_load", 320), ("reboot", 169), ("swapon", 167), ("swapoff", 168), ("acct", 163)),
        *(("quotactl", 179), ("syslog", 103), ("personality", 135), ("modify_ldt", 154), ("iopl", 172)),
        *(("ioperm", 173), ("fanotify_init", 300), ("move_pages", 279), ("migrate_pages", 256)),
        *(("sched_setattr", 314), ("sched_getattr", 315)),
    ),
)
