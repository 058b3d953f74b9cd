"""openat2(2): open files below a given directory, without following links out of it."""

import ctypes
import os

__all__ = ["open_child", "open_in_root"]

SYS_OPENAT2 = 437  # the same on every architecture
RESOLVE_NO_XDEV, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_BENEATH, RESOLVE_IN_ROOT = 1, 2, 4, 8, 16
TRIES = 8

_libc = ctypes.CDLL(None, use_errno=True)


class _OpenHow(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


def open_in_root(root_fd: int, path: str, flags: int) -> int:
    """Open `path` (absolute or not, it starts at `root_fd`); the descriptor is the caller's.

    Raises OSError with `path`. Does not create files.
    """
    return _open(root_fd, path, flags, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)


def open_child(directory_fd: int, name: str) -> int:
    """Open the directory `name` in another; the caller owns the descriptor.

    Raises OSError with `name`: also for a symbolic link (ENOTDIR) and for a mount point (EXDEV).
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
    return _open(directory_fd, name, flags, RESOLVE_NO_XDEV | RESOLVE_NO_SYMLINKS | RESOLVE_BENEATH)


def _open(directory_fd: int, path: str, flags: int, resolve: int) -> int:
    how = _OpenHow(flags | os.O_CLOEXEC, 0, resolve)
    for _ in range(TRIES):
        fd: int = _libc.syscall(
            ctypes.c_long(SYS_OPENAT2),
            ctypes.c_int(directory_fd),
            os.fsencode(path),
            ctypes.byref(how),
            ctypes.c_size_t(ctypes.sizeof(how)),
        )
        if fd >= 0:
            return fd
        error = ctypes.get_errno()
        if error != 11:  # EAGAIN: a rename in the tree raced with the lookup
            break
    raise OSError(error, os.strerror(error), path)
