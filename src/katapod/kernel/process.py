"""unshare(2), setns(2), and prctl(2) for orphans, death signals and secure bits.

Constants: linux/sched.h, linux/prctl.h, linux/securebits.h.
"""

import ctypes
import os
import signal

__all__ = [
    "CLONE_FS",
    "CLONE_NEWIPC",
    "CLONE_NEWNET",
    "CLONE_NEWNS",
    "CLONE_NEWUTS",
    "SECBIT_NO_SETUID_FIXUP",
    "add_secure_bits",
    "become_subreaper",
    "die_with_parent",
    "setns",
    "unshare",
]

CLONE_FS, CLONE_NEWNS, CLONE_NEWUTS = 0x00000200, 0x00020000, 0x04000000
CLONE_NEWIPC, CLONE_NEWNET = 0x08000000, 0x40000000
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
PR_GET_SECUREBITS, PR_SET_SECUREBITS = 27, 28
SECBIT_NO_SETUID_FIXUP = 1 << 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.unshare.argtypes = (ctypes.c_int,)
_libc.setns.argtypes = (ctypes.c_int, ctypes.c_int)
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
