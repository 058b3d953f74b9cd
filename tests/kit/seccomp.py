"""A seccomp profile as container engines have theirs: usual system calls are allowed, all others do not exist."""

from typing import Any

__all__ = ["ENOSYS", "deny_by_default"]

ENOSYS = 38

_FILES = """
    access chdir chmod chown chown32 close close_range copy_file_range creat dup dup2 dup3 faccessat faccessat2
    fadvise64 fadvise64_64 fallocate fchdir fchmod fchmodat fchmodat2 fchown fchown32 fchownat fcntl fcntl64
    fdatasync fgetxattr
    flistxattr flock fremovexattr fsetxattr fstat fstat64 fstatat64 fstatfs fstatfs64 fsync ftruncate ftruncate64
    futimesat getcwd getdents getdents64 getxattr inotify_add_watch inotify_init inotify_init1 inotify_rm_watch ioctl
    io_cancel io_destroy io_getevents io_setup io_submit lchown lchown32 lgetxattr link linkat listxattr llistxattr
    _llseek lremovexattr lseek lsetxattr lstat lstat64 mkdir mkdirat mknod mknodat newfstatat open openat openat2 pipe
    pipe2 pread64 preadv preadv2 pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv removexattr rename
    renameat renameat2 rmdir sendfile sendfile64 setxattr splice stat stat64 statfs statfs64 statx symlink symlinkat
    sync sync_file_range syncfs tee truncate truncate64 umask unlink unlinkat utime utimensat utimensat_time64 utimes
    vmsplice write writev mount umount umount2 pivot_root
"""
_PROCESSES = """
    alarm arch_prctl brk capget capset clock_getres clock_gettime clock_nanosleep clone clone3 execve execveat exit
    exit_group fork futex futex_waitv getcpu getegid getegid32 geteuid geteuid32 getgid getgid32 getgroups getgroups32
    getitimer getpgid getpgrp getpid getppid getpriority getrandom getresgid getresgid32 getresuid getresuid32
    getrlimit get_robust_list getrusage getsid get_thread_area gettid gettimeofday getuid getuid32 ioprio_get
    ioprio_set keyctl kill madvise membarrier memfd_create mincore mlock mlock2 mlockall mmap mmap2 mprotect mremap
    msync munlock munlockall munmap nanosleep pause pidfd_open pidfd_send_signal pkey_alloc pkey_free pkey_mprotect
    prctl prlimit64 process_madvise restart_syscall rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo
    rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_tgsigqueueinfo sched_getaffinity sched_getattr sched_getparam
    sched_get_priority_max sched_get_priority_min sched_getscheduler sched_rr_get_interval sched_setaffinity
    sched_setattr sched_setparam sched_setscheduler sched_yield seccomp setfsgid setfsuid setgid setgid32 setgroups
    setgroups32 setitimer setpgid setpriority setregid setresgid setresuid setreuid setrlimit set_robust_list setsid
    set_thread_area set_tid_address setuid setuid32 sigaltstack signalfd signalfd4 sysinfo tgkill time timer_create
    timer_delete timer_getoverrun timer_gettime timer_settime timerfd_create timerfd_gettime timerfd_settime times
    tkill ugetrlimit uname vfork wait4 waitid waitpid setns sethostname
"""
_TALK = """
    accept accept4 bind connect epoll_create epoll_create1 epoll_ctl epoll_pwait epoll_pwait2 epoll_wait eventfd
    eventfd2 getpeername getsockname getsockopt listen mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedsend
    mq_unlink msgctl msgget msgrcv msgsnd _newselect poll ppoll pselect6 recv recvfrom recvmmsg recvmsg select semctl
    semget semop semtimedop send sendmmsg sendmsg sendto setsockopt shmat shmctl shmdt shmget shutdown socket socketcall
    socketpair
"""


def deny_by_default(*rules: dict[str, Any]) -> dict[str, Any]:
    """`rules` come first, and what they name is not allowed beside them. `unshare` is one of the calls that are in no
    list: it answers ENOSYS."""
    named = {name for rule in rules for name in rule["names"]}
    allowed = [name for name in (_FILES + _PROCESSES + _TALK).split() if name not in named]
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": ENOSYS,
        "defaultErrno": "ENOSYS",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_AARCH64"],
        "syscalls": [*rules, {"names": allowed, "action": "SCMP_ACT_ALLOW"}],
    }
