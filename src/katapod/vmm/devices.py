"""What is attached to a VM, as values. `slot` is one of the places that the VMM's Capabilities offer."""

from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

__all__ = [
    "DEFAULT_DISKS",
    "MEMORY_BLOCK_MIB",
    "Device",
    "Disk",
    "DiskSettings",
    "Memory",
    "Nic",
    "SharedDirectory",
    "blocks_of",
    "dimm_sizes",
]

MEMORY_BLOCK_MIB = 128  # what an x86 guest can bring online at once
DIMM_GROWTH = 8  # a DIMM of 8 times the guest's memory takes an eighth of it


class SharedDirectory(Struct, frozen=True):
    """A directory of the host by virtio-fs: `socket` is where its virtiofsd listens."""

    tag: str
    socket: Path
    slot: int
    queue_size: int = 1024


class DiskSettings(Struct, frozen=True):
    """What the configuration says of disks. An overlay takes only its thread from here."""

    aio: str = "threads"
    cache_set: bool = False
    direct: bool = False
    no_flush: bool = False
    logical_sector_bytes: int = 0  # 0: the VMM's choice
    physical_sector_bytes: int = 0
    iothreads: int = 0  # of the machine, which the disks share


DEFAULT_DISKS = DiskSettings()


class Disk(Struct, frozen=True):
    """The raw file `path`, or block device of the host; or with `base` an overlay at `path` over the raw file `base`,
    which is never written to. It is made anew when the disk is attached, unless it is `kept` and there already."""

    disk_id: str
    path: Path
    slot: int
    read_only: bool = False
    host_device: bool = False
    base: Path | None = None
    kept: bool = False
    settings: DiskSettings = DEFAULT_DISKS


class Nic(Struct, frozen=True):
    """`queues` and `vhost` are the descriptors of the queues of `tap`, and of /dev/vhost-net for each of them or for
    none. They are the caller's, who may close them once the NIC is attached; to detach it nobody needs them. A VMM that
    opens taps by name is given none: it finds `tap` in its network namespace, as the user whom the tap belongs to."""

    number: int
    mac: str
    slot: int
    tap: str = ""
    mtu: int = 1500
    queues: Sequence[int] = ()
    vhost: Sequence[int] = ()


class Memory(Struct, frozen=True):
    """One more DIMM of `size_mib`, in whole blocks; they are numbered from 0, and do not come out again."""

    number: int
    size_mib: int
    hugepages: bool = False
    preallocated: bool = False


Device = SharedDirectory | Disk | Nic | Memory


def blocks_of(wanted_mib: int) -> int:
    """`wanted_mib` rounded up to whole blocks; 0 if nothing is wanted."""
    return max(0, -(-wanted_mib // MEMORY_BLOCK_MIB) * MEMORY_BLOCK_MIB)


def dimm_sizes(present_mib: int, more_mib: int) -> tuple[int, ...]:
    """More memory as DIMMs that a guest with `present_mib` can take one after the other; none if nothing is wanted.

    Its kernel keeps 64 bytes for each page that is plugged, and takes them from what it has already: a small guest that
    is given one big DIMM runs out of memory and panics. Each is at most DIMM_GROWTH times of what is there by then.
    Source: the kernel's admin-guide/mm/memory-hotplug.
    """
    sizes: list[int] = []
    while more_mib > 0:
        largest_mib = max(present_mib * DIMM_GROWTH // MEMORY_BLOCK_MIB, 1) * MEMORY_BLOCK_MIB
        sizes.append(min(more_mib, largest_mib))
        present_mib += sizes[-1]
        more_mib -= sizes[-1]
    return tuple(sizes)
