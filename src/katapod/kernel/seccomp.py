"""seccomp(2): a filter for the calling thread, and what a listener hears of it.

Sources: seccomp(2), seccomp_unotify(2), linux/seccomp.h.
"""

import ctypes
import fcntl
import os
import struct
from dataclasses import dataclass

__all__ = ["Notice", "add_filter", "let_continue", "next_notice", "refuse"]

SYS_SECCOMP = {"x86_64": 317}
SET_MODE_FILTER, NEW_LISTENER = 1, 1 << 3
IOCTL_RECEIVE, IOCTL_SEND = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_RECV, SECCOMP_IOCTL_NOTIF_SEND
CONTINUE = 1  # SECCOMP_USER_NOTIF_FLAG_CONTINUE
NOTICE = struct.Struct("=QIIiIQ6Q")  # struct seccomp_notif
ANSWER = struct.Struct("=QqiI")  # struct seccomp_notif_resp

_libc = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    """struct sock_fprog"""

    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]


def add_filter(program: bytes, *, listen: bool = False) -> int:
    """Filter the system calls of this thread, and of what it starts, for good: `program` is an array of struct
    sock_filter. It needs no_new_privs, or CAP_SYS_ADMIN.

    Returns the listener, a descriptor, with `listen`; else 0. Raises OSError.
    """
    parameter = _Program(len(program) // 8, program)
    flags = NEW_LISTENER if listen else 0
    number = ctypes.c_long(SYS_SECCOMP[os.uname().machine])
    result: int = _libc.syscall(number, SET_MODE_FILTER, ctypes.c_uint(flags), ctypes.byref(parameter))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


@dataclass(frozen=True, slots=True)
class Notice:
    """A system call that waits for our answer."""

    id: int
    pid: int
    number: int
    arguments: tuple[int, ...]  # six, 64 bits each


def next_notice(listener: int) -> Notice:
    """Blocks. Raises OSError: FileNotFoundError if the caller died meanwhile."""
    buffer = bytearray(NOTICE.size)
    fcntl.ioctl(listener, IOCTL_RECEIVE, buffer)
    notice_id, pid, _, number, _, _, *arguments = NOTICE.unpack(buffer)
    return Notice(notice_id, pid, number, tuple(arguments))


def let_continue(listener: int, notice: Notice) -> None:
    """Have the kernel do it as if there were no filter. Raises OSError: FileNotFoundError if the caller died."""
    fcntl.ioctl(listener, IOCTL_SEND, ANSWER.pack(notice.id, 0, 0, CONTINUE))


def refuse(listener: int, notice: Notice, error: int) -> None:
    """Have it fail with this error. Raises OSError: FileNotFoundError if the caller died."""
    fcntl.ioctl(listener, IOCTL_SEND, ANSWER.pack(notice.id, 0, -error, 0))
