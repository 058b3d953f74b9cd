"""fallocate(2), for holes in files. Constants: linux/falloc.h."""

import ctypes
import os

__all__ = ["punch_hole"]

FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 0x01, 0x02

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Free what a file has in a range, in bytes, which reads as zeros from then on; its size stays. Parts of pages are
    zeroed only. Raises OSError."""
    if _libc.fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
