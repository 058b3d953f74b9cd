"""A container image as a disk: how it is made on the host, and how the guest mounts it.

The disk is an ext4 file system with all files of the image, never written to again. Each container writes to
an overlay over it (qcow2.py). One that ends with its sandbox has to survive no crash of guest or host, and so neither
waits for the other (docs/adr/0009-root-file-system.md); one that is kept has to survive the guest's
(docs/adr/0060-containers-that-start-again.md).
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from msgspec import Struct

__all__ = [
    "KEPT_MOUNT_OPTIONS",
    "MOUNT_OPTIONS",
    "ROOT_DISK_FORMAT",
    "ROOT_DISK_FSTYPE",
    "RootDirectory",
    "plan_disk_bytes",
    "render_debugfs",
    "render_mke2fs",
    "render_times",
    "root_disk_id",
]

ROOT_DISK_FORMAT = 2
"""Raised when a disk made by an older version shall not be used any more."""

ROOT_DISK_FSTYPE = "ext4"

FREE_BYTES = 32 << 30
"""What a container can write. It costs nothing before it is written: the disk is sparse, its tables are not
initialised."""

_GROUP_BYTES = 128 << 20  # of 4 KiB blocks

_FEATURES = (
    "none",  # not what the host's mke2fs.conf says: the guest's kernel has to know them all
    "has_journal",  # without one ext4 does not reuse the inodes of deleted files for minutes, and searches for others
    "fast_commit",  # a synchronous write is one block of the journal, not three
    *("dir_index", "dir_nlink", "ext_attr", "extent", "extra_isize", "filetype", "flex_bg", "huge_file"),
    *("large_file", "sparse_super"),
    "uninit_bg",  # checksums of the group descriptors, so that tables can stay uninitialised
)

MOUNT_OPTIONS = (
    "noatime",  # else the first read of each file of the image is a write
    "noinit_itable",  # do not fill tables with zeros in the background
    "nobarrier",
    "data=writeback",
    "commit=300",  # seconds
)
"""For an overlay that ends with the guest: the order of writes matters to nobody."""

KEPT_MOUNT_OPTIONS = ("noatime", "noinit_itable")
"""For one that is kept: by barriers the journal is whole, also when the guest is killed."""


class RootDirectory(Struct, frozen=True):
    """The root directory itself, of which mke2fs takes over the extended attributes only.

    mke2fs makes a directory lost+found, and fills it if the image has one (`has_lost_found`). What else an image has of
    that name has to come under another one, `stand_in`.
    """

    mode: int
    uid: int
    gid: int
    mtime_s: int
    has_lost_found: bool
    stand_in: str = ""


def plan_disk_bytes(content_bytes: int) -> int:
    """Size of the disk for an image of that size; whole block groups."""
    return -(-(content_bytes + FREE_BYTES) // _GROUP_BYTES) * _GROUP_BYTES


def render_mke2fs(rootfs: Path, image: Path) -> list[str]:
    """Return the command that fills `image`, a sparse file of the right size, with the files of `rootfs`."""
    return [
        "mke2fs",
        *("-q", "-F", "-t", ROOT_DISK_FSTYPE),
        *("-O", ",".join(_FEATURES)),
        *("-b", "4096", "-I", "256", "-i", "16384", "-J", "size=4", "-m", "0"),
        *("-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1"),
        *("-d", str(rootfs)),
        str(image),
    ]


def render_debugfs(root: RootDirectory) -> str:
    """Return debugfs' commands that make the disk's root directory like the image's. Source: debugfs(8)."""
    commands = [] if root.has_lost_found else ["rmdir /lost+found"]
    if root.stand_in:  # neither command changes the count of links
        commands += [f"ln /{root.stand_in} /lost+found", f"unlink /{root.stand_in}"]
    commands += [
        f"set_inode_field / mode 0{root.mode:o}",
        f"set_inode_field / uid {root.uid}",
        f"set_inode_field / gid {root.gid}",
        f"set_inode_field / mtime @{root.mtime_s}",
    ]
    return "".join(f"{command}\n" for command in commands)


def render_times(times: Iterable[tuple[str, int]]) -> str:
    """Return debugfs' commands for what mke2fs leaves out of the times of change: the part below a second, and what 32
    bits of seconds cannot hold. `times`: path from the root directory, nanoseconds since the epoch.

    A path with a line break cannot be named in debugfs' commands, and its file keeps whole seconds. Source: the
    kernel's filesystems/ext4/inodes (i_mtime_extra: two bits of the epoch below the nanoseconds); debugfs(8).
    """
    commands = []
    for path, mtime_ns in times:
        seconds, below_ns = divmod(mtime_ns, 1_000_000_000)
        epoch = ((seconds - _as_signed_32(seconds)) >> 32) & 3
        extra = below_ns << 2 | epoch
        if extra and not any(char in path for char in "\n\r\0"):
            quoted = path.replace('"', '""')
            commands.append(f'set_inode_field "{quoted}" mtime_extra {extra:#x}\n')
    return "".join(commands)


def _as_signed_32(number: int) -> int:
    return (number + 0x8000_0000) % 0x1_0000_0000 - 0x8000_0000


def root_disk_id(container_id: str) -> str:
    """A container's id may be longer than QEMU allows."""
    return f"root-{hashlib.sha256(container_id.encode()).hexdigest()[:16]}"
