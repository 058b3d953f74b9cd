"""mount(2), umount2(2), and the calls on mount trees: open_tree, mount_setattr(2), move_mount.

The flags are those of linux/mount.h. Mount trees need Linux 5.12.
"""

from __future__ import annotations

import ctypes
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "MNT_DETACH",
    "MOUNT_ATTR_NODEV",
    "MOUNT_ATTR_NOEXEC",
    "MOUNT_ATTR_NOSUID",
    "MOUNT_ATTR_RDONLY",
    "MS_BIND",
    "MS_MOVE",
    "MS_NODEV",
    "MS_NOEXEC",
    "MS_NOSUID",
    "MS_PRIVATE",
    "MS_RDONLY",
    "MS_REC",
    "MS_RELATIME",
    "MS_REMOUNT",
    "MS_SHARED",
    "MS_SLAVE",
    "attach_tree",
    "attach_tree_at",
    "clone_tree",
    "mount",
    "parse_options",
    "set_tree_attributes",
    "umount",
]

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_MOVE, MS_REC = 4096, 8192, 16384
MS_PRIVATE, MS_SLAVE, MS_SHARED, MS_RELATIME = 1 << 18, 1 << 19, 1 << 20, 1 << 21
MS_SYNCHRONOUS, MS_NOATIME, MS_NODIRATIME, MS_STRICTATIME = 16, 1024, 2048, 1 << 24
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8

_FLAGS = {
    "ro": MS_RDONLY, "nosuid": MS_NOSUID, "nodev": MS_NODEV, "noexec": MS_NOEXEC, "remount": MS_REMOUNT,
    "bind": MS_BIND, "rbind": MS_BIND | MS_REC, "sync": MS_SYNCHRONOUS, "noatime": MS_NOATIME,
    "nodiratime": MS_NODIRATIME, "relatime": MS_RELATIME, "strictatime": MS_STRICTATIME,
    "private": MS_PRIVATE, "rprivate": MS_PRIVATE | MS_REC, "slave": MS_SLAVE,
    "rslave": MS_SLAVE | MS_REC, "shared": MS_SHARED, "rshared": MS_SHARED | MS_REC,
}  # fmt: skip
_CLEARS = {
    "rw": MS_RDONLY, "suid": MS_NOSUID, "dev": MS_NODEV, "exec": MS_NOEXEC, "async": MS_SYNCHRONOUS,
    "atime": MS_NOATIME, "diratime": MS_NODIRATIME, "defaults": 0,
}  # fmt: skip

MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC = 1, 2, 4, 8
SYS_OPEN_TREE, SYS_MOVE_MOUNT, SYS_MOUNT_SETATTR = 428, 429, 442  # the same on every architecture
AT_FDCWD, AT_EMPTY_PATH, AT_RECURSIVE = -100, 0x1000, 0x8000
OPEN_TREE_CLONE, MOVE_MOUNT_F_EMPTY_PATH, MOVE_MOUNT_T_EMPTY_PATH = 1, 4, 0x40

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)


def parse_options(options: Iterable[str]) -> tuple[int, str]:
    """Split mount options into the flags of mount(2) and the text for the file system."""
    flags, data = 0, []
    for option in options:
        if option in _FLAGS:
            flags |= _FLAGS[option]
        elif option in _CLEARS:
            flags &= ~_CLEARS[option]
        elif option:
            data.append(option)
    return flags, ",".join(data)


def mount(source: str, target: str, fstype: str | None = None, flags: int = 0, data: str | None = None) -> None:
    """Raises OSError with `target` as its file name."""
    result = _libc.mount(
        os.fsencode(source),
        os.fsencode(target),
        fstype.encode() if fstype else None,
        flags,
        os.fsencode(data) if data else None,
    )
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), target)


def umount(target: str, flags: int = 0) -> None:
    """Never follows a symbolic link at `target`. Raises OSError."""
    if _libc.umount2(os.fsencode(target), flags | UMOUNT_NOFOLLOW) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), target)


class _MountAttr(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


def _call(path: str, number: int, *arguments: object) -> int:
    result: int = _libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), path)
    return result


def clone_tree(path: str, *, recursive: bool = True) -> int:
    """Copy the mounts at and below `path` into a detached tree. The caller owns the descriptor, which holds the tree:
    if it is closed before attach_tree, the tree is gone. Raises OSError."""
    flags = OPEN_TREE_CLONE | (AT_RECURSIVE if recursive else 0) | os.O_CLOEXEC
    return _call(path, SYS_OPEN_TREE, ctypes.c_int(AT_FDCWD), os.fsencode(path), ctypes.c_uint(flags))


def set_tree_attributes(tree: int, *, attributes: int = 0, propagation: int = 0, recursive: bool = True) -> None:
    """Set attributes (MOUNT_ATTR_*) and propagation (MS_PRIVATE, ...) of all mounts of a tree, or of its top.

    Raises OSError.
    """
    wanted = _MountAttr(attr_set=attributes, propagation=propagation)
    _call(
        "",
        SYS_MOUNT_SETATTR,
        ctypes.c_int(tree),
        b"",
        ctypes.c_uint(AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)),
        ctypes.byref(wanted),
        ctypes.c_size_t(ctypes.sizeof(wanted)),
    )


def attach_tree(tree: int, target: str) -> None:
    """Mount a cloned tree at `target`. Raises OSError."""
    _call(
        target,
        SYS_MOVE_MOUNT,
        ctypes.c_int(tree),
        b"",
        ctypes.c_int(AT_FDCWD),
        os.fsencode(target),
        ctypes.c_uint(MOVE_MOUNT_F_EMPTY_PATH),
    )


def attach_tree_at(tree: int, place: int) -> None:
    """Mount a cloned tree at what the descriptor `place` refers to. Raises OSError."""
    _call(
        "",
        SYS_MOVE_MOUNT,
        ctypes.c_int(tree),
        b"",
        ctypes.c_int(place),
        b"",
        ctypes.c_uint(MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH),
    )
