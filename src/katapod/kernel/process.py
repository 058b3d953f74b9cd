"""unshare(2), setns(2), kcmp(2), personality(2), and prctl(2) for orphans, death signals and secure bits.

Constants: linux/sched.h, linux/prctl.h, linux/securebits.h, linux/personality.h, linux/kcmp.h, asm/unistd.h.
"""

import ctypes
import errno
import os
import signal

__all__ = [
    "ADDR_NO_RANDOMIZE",
    "CLONE_FS",
    "CLONE_NEWCGROUP",
    "CLONE_NEWIPC",
    "CLONE_NEWNET",
    "CLONE_NEWNS",
    "CLONE_NEWPID",
    "CLONE_NEWUTS",
    "SECBIT_NO_SETUID_FIXUP",
    "add_secure_bits",
    "become_subreaper",
    "die_with_parent",
    "set_personality",
    "setns",
    "share_memory",
    "unshare",
]

CLONE_FS, CLONE_NEWNS, CLONE_NEWUTS = 0x00000200, 0x00020000, 0x04000000
CLONE_NEWIPC, CLONE_NEWNET = 0x08000000, 0x40000000
CLONE_NEWCGROUP, CLONE_NEWPID = 0x02000000, 0x20000000
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
PR_GET_SECUREBITS, PR_SET_SECUREBITS = 27, 28
SECBIT_NO_SETUID_FIXUP = 1 << 2
ADDR_NO_RANDOMIZE = 0x0040000
KCMP_VM = 1
_KCMP = {"x86_64": 312, "aarch64": 272, "riscv64": 272, "ppc64le": 354, "s390x": 343}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.unshare.argtypes = (ctypes.c_int,)
_libc.setns.argtypes = (ctypes.c_int, ctypes.c_int)
_libc.personality.argtypes = (ctypes.c_ulong,)
_libc.prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)


def _check(result: int) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def unshare(flags: int) -> None:
    """Give the calling thread new namespaces. Raises OSError."""
    _check(_libc.unshare(flags))


def setns(fd: int, kind: int) -> None:
    """Move the calling thread into the namespace that `fd` refers to, of `kind` CLONE_NEW... Raises OSError."""
    _check(_libc.setns(fd, kind))


def set_personality(persona: int) -> int:
    """Set the personality of the calling thread, which a program that it executes inherits; returns the former one.

    Raises OSError.
    """
    former: int = _libc.personality(persona)
    if former < 0:
        _check(former)
    return former


def share_memory(pid: int, other: int) -> bool:
    """Whether two processes have one address space (clone(2) with CLONE_VM). False where the kernel cannot tell.

    Raises ProcessLookupError if one has ended, PermissionError.
    """
    number = _KCMP.get(os.uname().machine)
    if number is None:
        return False
    result: int = _libc.syscall(
        ctypes.c_long(number), ctypes.c_int(pid), ctypes.c_int(other), ctypes.c_int(KCMP_VM), None, None
    )
    if result < 0 and ctypes.get_errno() != errno.ENOSYS:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result == 0


def add_secure_bits(bits: int) -> bool:
    """Set SECBIT_... of the calling thread, which a program that it executes inherits: capabilities(7).

    Returns whether that was permitted: it requires CAP_SETPCAP.
    """
    have: int = _libc.prctl(PR_GET_SECUREBITS, 0, 0, 0, 0)
    return have >= 0 and bool(_libc.prctl(PR_SET_SECUREBITS, have | bits, 0, 0, 0) == 0)


def become_subreaper() -> None:
    """From now on orphaned descendants become children of this process, as they do of PID 1."""
    _check(_libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))


def die_with_parent(parent_pid: int) -> None:
    """In a child, before exec: request SIGKILL for when the parent's thread that forked it ends.

    A parent that died before this call sends no signal, so the child exits here in that case. Nothing else may be done
    between fork and exec, so errors end the child as well.
    """
    if _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0 or os.getppid() != parent_pid:
        os._exit(127)
