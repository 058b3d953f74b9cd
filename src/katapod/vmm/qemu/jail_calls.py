"""The system calls that a QEMU may make in its jail.

Those that were seen (system_calls.py), and beside them those that any program may want of a C library, of this version
or another, and that open no way: on the program's own memory, descriptors, threads, signals and clocks. A call that
fails in a rare situation would end a guest that has done no harm. What is left out is what could reach further: sockets
but unix ones and to connect those, namespaces, mounts, tracing, other users, names and modes of files, keys, BPF,
modules; and prctl(2) but for what is listed, since a QEMU that was taken over would undo its death signal
(PR_SET_PDEATHSIG) and outlive its supervisor. clone3 fails, since a filter cannot look at its flags, and the C library
calls clone then.

execve is there for the start. QEMU's own -sandbox comes on top of this list, once it runs, and forbids that, too.
"""

from katapod.plan.call_filter import CallFilter, CallRule
from katapod.vmm.qemu.system_calls import CALLS

__all__ = ["QEMU_CALLS", "QEMU_CALLS_WITH_IO_URING"]

# fmt: off
HARMLESS = (
    ("io_setup", 206), ("io_submit", 209), ("io_getevents", 208), ("io_pgetevents", 333), ("io_cancel", 210),
    ("io_destroy", 207),
    ("access", 21), ("close", 3), ("close_range", 436), ("copy_file_range", 326), ("dup", 32), ("dup2", 33),
    ("dup3", 292), ("eventfd", 284), ("eventfd2", 290), ("faccessat", 269), ("faccessat2", 439),
    ("fadvise64", 221), ("fallocate", 285), ("fcntl", 72), ("fdatasync", 75), ("flock", 73), ("fstat", 5),
    ("fstatfs", 138), ("fsync", 74), ("ftruncate", 77), ("getcwd", 79), ("getdents", 78), ("getdents64", 217),
    ("ioctl", 16), ("lseek", 8), ("lstat", 6), ("memfd_create", 319), ("newfstatat", 262), ("open", 2),
    ("openat", 257), ("openat2", 437), ("pipe", 22), ("pipe2", 293), ("pread64", 17), ("preadv", 295),
    ("preadv2", 327), ("pwrite64", 18), ("pwritev", 296), ("pwritev2", 328), ("read", 0), ("readlink", 89),
    ("readlinkat", 267), ("readv", 19), ("sendfile", 40), ("splice", 275), ("stat", 4), ("statfs", 137),
    ("statx", 332), ("sync_file_range", 277), ("tee", 276), ("umask", 95), ("unlink", 87), ("unlinkat", 263),
    ("write", 1), ("writev", 20),
    ("epoll_create", 213), ("epoll_create1", 291), ("epoll_ctl", 233), ("epoll_pwait", 281), ("epoll_pwait2", 441),
    ("epoll_wait", 232), ("futex", 202), ("futex_waitv", 449), ("poll", 7), ("ppoll", 271), ("pselect6", 270),
    ("select", 23), ("signalfd", 282), ("signalfd4", 289), ("timerfd_create", 283), ("timerfd_gettime", 287),
    ("timerfd_settime", 286),
    ("brk", 12), ("get_mempolicy", 239), ("madvise", 28), ("mbind", 237), ("membarrier", 324), ("mincore", 27),
    ("mlock", 149), ("mlock2", 325), ("mmap", 9), ("mprotect", 10), ("mremap", 25), ("msync", 26),
    ("munlock", 150), ("munmap", 11), ("pkey_alloc", 330), ("pkey_free", 331), ("pkey_mprotect", 329),
    ("set_mempolicy", 238),
    ("kill", 62), ("pause", 34), ("restart_syscall", 219), ("rt_sigaction", 13), ("rt_sigpending", 127),
    ("rt_sigprocmask", 14), ("rt_sigqueueinfo", 129), ("rt_sigreturn", 15), ("rt_sigsuspend", 130),
    ("rt_sigtimedwait", 128), ("rt_tgsigqueueinfo", 297), ("sigaltstack", 131), ("tgkill", 234), ("tkill", 200),
    ("alarm", 37), ("clock_getres", 229), ("clock_gettime", 228), ("clock_nanosleep", 230), ("getitimer", 36),
    ("gettimeofday", 96), ("nanosleep", 35), ("setitimer", 38), ("time", 201), ("timer_create", 222),
    ("timer_delete", 226), ("timer_getoverrun", 225), ("timer_gettime", 224), ("timer_settime", 223),
    ("times", 100),
    ("arch_prctl", 158), ("capget", 125), ("execve", 59), ("exit", 60), ("exit_group", 231),
    ("get_robust_list", 274), ("getcpu", 309), ("getegid", 108), ("geteuid", 107), ("getgid", 104),
    ("getgroups", 115), ("getpgid", 121), ("getpgrp", 111), ("getpid", 39), ("getppid", 110), ("getpriority", 140),
    ("getrandom", 318), ("getresgid", 120), ("getresuid", 118), ("getrlimit", 97), ("getrusage", 98),
    ("getsid", 124), ("gettid", 186), ("getuid", 102), ("prlimit64", 302), ("rseq", 334),
    ("sched_get_priority_max", 146), ("sched_get_priority_min", 147), ("sched_getaffinity", 204),
    ("sched_getparam", 143), ("sched_getscheduler", 145), ("sched_setaffinity", 203), ("sched_yield", 24),
    ("seccomp", 317), ("set_robust_list", 273), ("set_tid_address", 218), ("sysinfo", 99), ("uname", 63),
    ("wait4", 61), ("waitid", 247),
    ("accept", 43), ("accept4", 288), ("getpeername", 52), ("getsockname", 51), ("getsockopt", 55), ("listen", 50),
    ("recvfrom", 45), ("recvmmsg", 299), ("recvmsg", 47), ("sendmmsg", 307), ("sendmsg", 46), ("sendto", 44),
    ("setsockopt", 54), ("shutdown", 48),
)
# fmt: on
IO_URING = (("io_uring_setup", 425), ("io_uring_enter", 426), ("io_uring_register", 427))
NEW_NAMESPACES = 0x7E020000  # CLONE_NEW...
AF_UNIX = 1
# linux/prctl.h: GET_DUMPABLE, SET_NAME, GET_NAME, GET_SECCOMP, SET_SECCOMP, CAPBSET_READ, SET_TIMERSLACK, MCE_KILL,
# SET_NO_NEW_PRIVS, GET_NO_NEW_PRIVS, SET_VMA
PRCTL = (3, 15, 16, 21, 22, 23, 29, 33, 38, 39, 0x53564D41)
BY_ARGUMENT = (
    CallRule("clone", 56, 0, (0,), NEW_NAMESPACES),
    CallRule("prctl", 157, 0, PRCTL),
    CallRule("socket", 41, 0, (AF_UNIX,)),
    CallRule("socketpair", 53, 0, (AF_UNIX,)),
)


def _filter(more: tuple[tuple[str, int], ...] = ()) -> CallFilter:
    rules = {rule.name: rule for rule in CALLS}
    rules |= {name: CallRule(name, number) for name, number in (*HARMLESS, *more)}
    rules |= {rule.name: rule for rule in BY_ARGUMENT}
    return CallFilter(tuple(rules[name] for name in sorted(rules)))


QEMU_CALLS = _filter()
QEMU_CALLS_WITH_IO_URING = _filter(IO_URING)
"""For disks with aio=io_uring. What that does for a program passes no filter, so only who asks for it has it."""
