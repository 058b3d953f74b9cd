"""What a user can do about an error of the kernel, where that can be told from its number."""

import errno
import os

__all__ = ["hint_for"]


def hint_for(exc: OSError) -> str:
    """Empty where nothing general helps. Source: errno(3)."""
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space on that file system"
    if exc.errno == errno.EROFS:
        return "that file system is mounted read-only"
    if exc.errno in (errno.EACCES, errno.EPERM) and os.geteuid() != 0:
        return "this needs root: run it with sudo"
    return ""
