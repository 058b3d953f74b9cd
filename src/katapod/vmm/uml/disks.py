"""Disks of User-mode Linux, planned as data: virtio-blk devices that qemu-storage-daemons serve by vhost-user.

How they are used: the kernel's command line names a socket for each place that a disk can have, disk_options(), whether
there is one or not. serving_disk() (disk_server.py) has a daemon serve the disk in a place. The guest finds it by that
place, guest_path(): "virtio-uml.3" is what the kernel calls its fourth virtio device. An overlay is the same qcow2 file
over a shared raw file as with QEMU (host/overlays.py makes it), and what the guest discards there is given back.

The kernel's own disks (ubd) were no match for overlays: their copy-on-write bitmap for a disk of 34 GiB takes 9 MiB of
the guest's memory and is read anew whenever the disk is opened, 0.2 s a start; requests are cut to 32 KiB.

Each disk has a daemon of its own, in a jail like the kernel's: what is at the other end of its socket may be hostile.
It sees its own libraries and the files of the disk, nothing else, so that CAP_DAC_OVERRIDE there opens those of root.

Source: qemu-storage-daemon(1); virtio_uml.device in the kernel's arch/um/drivers/virtio_uml.c.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct, structs

from katapod.plan.jail import Access, Bind, JailPlan
from katapod.vmm.block_nodes import disk_node_options
from katapod.vmm.devices import Disk
from katapod.vmm.errors import VmmRefused
from katapod.vmm.uml.disk_calls import DISK_CALLS

__all__ = [
    "DEVICES_BEFORE",
    "DISKS_MAX",
    "FIRST_SLOT",
    "DiskServerPlan",
    "disk_node",
    "disk_options",
    "disk_socket",
    "guest_path",
]

DISKS_MAX = 24
FIRST_SLOT = 16  # of a disk; those before it are of other devices
DEVICES_BEFORE = 2  # virtio devices that the command line names before the disks: console, shared directory
VIRTIO_BLK = 2  # device id of the virtio specification
NULL = Path("/dev/null")  # it locks it once, to learn which locks of files the kernel has; see fcntl(2)
CAP_DAC_OVERRIDE = 1
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
PROGRAM = "/qemu-storage-daemon"  # in the jail, as all of these
DISKS = "/disks"


def disk_socket(disk: Disk) -> str:
    """The name of its socket. Raises VmmRefused for a slot that is none."""
    return _socket_of(_place_of(disk))


def disk_node(disk: Disk) -> str:
    """Its name in the daemon."""
    return f"disk{_place_of(disk)}"


def disk_options(sockets: Path) -> tuple[str, ...]:
    """Of the kernel's command line, which finds its sockets in the directory `sockets`: one for each place."""
    return tuple(f"virtio_uml.device={sockets / _socket_of(place)}:{VIRTIO_BLK}" for place in range(DISKS_MAX))


def guest_path(disk: Disk) -> str:
    """Where the guest finds it, by the kernel's name of its place. Raises VmmRefused."""
    return f"virtio-uml.{DEVICES_BEFORE + _place_of(disk)}"


def _place_of(disk: Disk) -> int:
    place = disk.slot - FIRST_SLOT
    if not 0 <= place < DISKS_MAX:
        raise VmmRefused(f"cannot attach disk {disk.disk_id}: slot {disk.slot} is none of a disk")
    return place


def _socket_of(place: int) -> str:
    return f"disk{place}.sock"


class DiskServerPlan(Struct, frozen=True):
    """The daemon for a disk. `program` is its path on the host."""

    program: Path
    disk: Disk

    def describe(self) -> str:
        return "\n".join([str(self.program), *(f"  {word}" for word in self.words(0, 0))])

    def words(self, listener: int, monitor: int) -> list[str]:
        """Its arguments, for a listening socket and one end of a socket pair, in its jail."""
        disk, name = self._in_jail, disk_node(self.disk)
        export: dict[str, object] = {
            "type": "vhost-user-blk",
            "id": name,
            "node-name": name,
            "addr": {"type": "fd", "str": str(listener)},
            "writable": not disk.read_only,
            # it tells the guest that there is nothing to flush (no write cache), and then has to keep that promise: an
            # overlay that is kept has all in its file once a write is answered
            "writethrough": disk.kept if disk.base is not None else not disk.settings.no_flush,
        }
        if disk.settings.logical_sector_bytes:
            export["logical-block-size"] = disk.settings.logical_sector_bytes
        return [
            *("--chardev", f"socket,id=monitor,fd={monitor}", "--monitor", "chardev=monitor"),
            *("--blockdev", json.dumps({"node-name": name, **disk_node_options(disk)})),
            *("--export", json.dumps(export)),
        ]

    @property
    def _in_jail(self) -> Disk:
        base = Path(DISKS) / "base" if self.disk.base is not None else None
        return structs.replace(self.disk, path=Path(DISKS) / "disk", base=base)

    def jail(self, uid: int, present: Mapping[str, Path]) -> JailPlan:
        """For the user `uid`; `present` are those of LIBRARIES that the host has, and where they really are."""
        disk, inside = self.disk, self._in_jail
        access = Access.DEVICE if disk.host_device else Access.READ if disk.read_only else Access.WRITE
        binds = [Bind(self.program, PROGRAM, Access.EXECUTE)]
        binds += [Bind(real, target, Access.EXECUTE) for target, real in present.items()]
        binds += [Bind(NULL, str(NULL), Access.DEVICE), Bind(disk.path, str(inside.path), access)]
        if disk.base is not None:
            binds.append(Bind(disk.base, str(inside.base), Access.READ))
        return JailPlan(
            uid, tuple(binds), calls=DISK_CALLS, capabilities=frozenset({CAP_DAC_OVERRIDE}), hostname="disk"
        )
