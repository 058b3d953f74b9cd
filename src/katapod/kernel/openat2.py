"""openat2(2): open a path as if a given directory were the root, so that no link leads out of it."""

import ctypes
import os

__all__ = ["open_in_root"]

SYS_OPENAT2 = 437  # the same on every architecture
RESOLVE_NO_MAGICLINKS, RESOLVE_IN_ROOT = 0x02, 0x10
TRIES = 8

_libc = ctypes.CDLL(None, use_errno=True)


class _OpenHow(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


def open_in_root(root_fd: int, path: str, flags: int) -> int:
    """Open `path` (absolute or not, it starts at `root_fd`); the descriptor is the caller's.

    Raises OSError with `path`. Does not create files.
    """
    how = _OpenHow(flags | os.O_CLOEXEC, 0, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
    for _ in range(TRIES):
        fd: int = _libc.syscall(
            ctypes.c_long(SYS_OPENAT2),
            ctypes.c_int(root_fd),
            os.fsencode(path),
            ctypes.byref(how),
            ctypes.c_size_t(ctypes.sizeof(how)),
        )
        if fd >= 0:
            return fd
        error = ctypes.get_errno()
        if error != 11:  # EAGAIN: a rename in the tree ran across the walk
            break
    raise OSError(error, os.strerror(error), path)
