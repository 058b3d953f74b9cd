"""What a process gives up: capabilities, the way to new ones, its root directory, its descriptors.

Sources: capabilities(7), prctl(2), pivot_root(2), close_range(2), personality(2), linux/capability.h.
"""

import ctypes
import os
from collections.abc import Iterable

__all__ = [
    "close_on_exec_from",
    "drop_bounding_set",
    "fix_addresses",
    "forbid_new_privileges",
    "keep_capabilities",
    "pivot_root",
    "set_capabilities",
    "set_death_signal",
]

PR_SET_PDEATHSIG, PR_SET_KEEPCAPS = 1, 8
PR_CAPBSET_READ, PR_CAPBSET_DROP = 23, 24
PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 38, 47
PR_CAP_AMBIENT_RAISE, PR_CAP_AMBIENT_CLEAR_ALL = 2, 4
LINUX_CAPABILITY_VERSION_3 = 0x20080522
CLOSE_RANGE_CLOEXEC = 4
ADDR_NO_RANDOMIZE = 0x0040000
SYS_CLOSE_RANGE = 436  # the same on every architecture
SYS_PIVOT_ROOT = {"x86_64": 155}
SYS_CAPSET = {"x86_64": 126}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)


def _check(result: int) -> None:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def _check_all(results: Iterable[int]) -> None:
    for result in results:
        _check(result)


def forbid_new_privileges() -> None:
    """No program that this process executes gets more than it has. Raises OSError."""
    _check(_libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def set_death_signal(number: int) -> None:
    """Sent when the parent's thread ends that forked this process. A change of user takes it back. Raises OSError."""
    _check(_libc.prctl(PR_SET_PDEATHSIG, number, 0, 0, 0))


def fix_addresses() -> None:
    """What this process executes has its stack, heap and libraries at no random addresses. Raises OSError."""
    _check(_libc.personality(ctypes.c_ulong(ADDR_NO_RANDOMIZE)))


def drop_bounding_set(kept: frozenset[int]) -> None:
    """Take all capabilities but `kept` out of the bounding set, which has to be done as root. Raises OSError."""
    number = 0
    while (there := _libc.prctl(PR_CAPBSET_READ, number, 0, 0, 0)) >= 0:  # EINVAL: one more than the last
        if there and number not in kept:
            _check(_libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0))
        number += 1


def keep_capabilities() -> None:
    """Keep the permitted ones when root becomes another user. Raises OSError."""
    _check(_libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0))


class _CapabilityHeader(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


def set_capabilities(capabilities: frozenset[int]) -> None:
    """Have exactly these, effective and permitted, and keep them across execve(2): inheritable and ambient.
    Raises OSError."""
    low, high = (sum(1 << number - base for number in capabilities if base <= number < base + 32) for base in (0, 32))
    header = _CapabilityHeader(LINUX_CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)(low, low, low, high, high, high)
    _check(_libc.syscall(ctypes.c_long(SYS_CAPSET[os.uname().machine]), ctypes.byref(header), sets))
    _check(_libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0))
    _check_all(_libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, number, 0, 0) for number in sorted(capabilities))


def pivot_root(new_root: str, old_root: str) -> None:
    """Raises OSError."""
    number = ctypes.c_long(SYS_PIVOT_ROOT[os.uname().machine])
    _check(_libc.syscall(number, os.fsencode(new_root), os.fsencode(old_root)))


def close_on_exec_from(first: int) -> None:
    """All descriptors from this number on are closed by execve(2), known ones or not. Raises OSError."""
    flags = ctypes.c_uint(CLOSE_RANGE_CLOEXEC)
    _check(_libc.syscall(ctypes.c_long(SYS_CLOSE_RANGE), ctypes.c_uint(first), ctypes.c_uint(0xFFFFFFFF), flags))
