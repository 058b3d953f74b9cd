"""Disks that the host could not read or write, as the guest's kernel tells of them on its console.

Nobody else does: a qemu-storage-daemon answers a request with an error and says nothing of it, neither by its monitor
nor in its log. Why it failed is found on the host: whether the file system of a disk is full. A guest can tell what it
likes; it says it of its own disks, and the worst that comes of it is its own end.

Source: the kernel's block/blk-mq.c, blk_print_req_error().
"""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from katapod.vmm.devices import Disk
from katapod.vmm.protocol import DiskError

__all__ = ["ConsoleWatch", "disk_error_of", "name_of", "parse_disk_error"]

LINE_MAX = 1024
FULL_BYTES = 1 << 20  # what is left of a file system when a cluster of qcow2 finds no room any more, and something more
_ERROR = re.compile(rb"[A-Za-z /]{1,40} error, dev (vd[a-z]), sector \d{1,20} op 0x[0-9a-f]{1,8}:\(([A-Z_]{1,20})\)")
READ = b"READ"


def parse_disk_error(line: bytes) -> tuple[str, bool] | None:
    """The kernel's name of the disk, and whether it was written; None: the line says nothing of that."""
    found = _ERROR.search(line)
    return (found[1].decode(), found[2] != READ) if found is not None else None


def name_of(position: int) -> str:
    """What the guest's kernel calls its disk of this number, from 0: the lowest that is free when it gets it."""
    return f"vd{chr(ord('a') + position)}"


def disk_error_of(name: str, writing: bool, disks: Sequence[tuple[str, Disk]]) -> DiskError | None:
    """What the host makes of it. `disks` have the names that the guest should have given them.

    Of a write, the disk whose file system is full is the one. As with QEMU, an overlay that cannot be written and a
    full file system end the sandbox; of other errors the guest was told.
    """
    writable = [disk for _, disk in disks if not disk.read_only]
    full = [disk for disk in writable if writing and not disk.host_device and _is_full(disk.path)]
    named = next((disk for given, disk in disks if given == name), None)
    disk = named if named in full or not full else full[0]
    if disk is None:
        return None
    return DiskError(disk.disk_id, writing, bool(full), stopped=writing and (bool(full) or disk.base is not None))


def _is_full(path: Path) -> bool:
    try:
        found = os.statvfs(path)
    except OSError:
        return False
    return found.f_bavail * found.f_frsize < FULL_BYTES


class ConsoleWatch:
    """Reads what is written to a console. `told` is called with each error: the disk's name, and whether it was
    written."""

    def __init__(self) -> None:
        self.told: Callable[[str, bool], None] = lambda name, writing: None
        self._rest = b""

    def hear(self, data: bytes) -> None:
        *lines, rest = (self._rest + data).split(b"\n")
        self._rest = rest[-LINE_MAX:]
        for line in lines:
            found = parse_disk_error(line[:LINE_MAX])
            if found is not None:
                self.told(*found)
