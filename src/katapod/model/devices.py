"""The devices of a sandbox's VM, as a table: which place each of them has, and what of the host is behind it."""

from collections.abc import Iterable

from msgspec import Struct
from msgspec.structs import replace

__all__ = [
    "DeviceRecord",
    "DeviceTable",
    "DimmEntry",
    "DiskEntry",
    "MemoryEntry",
    "NicEntry",
    "ShareEntry",
]


class ShareEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """The shared directory. `guest_path` of any entry is where the guest finds the device: empty before it is there."""

    tag: str
    slot: int
    socket: str  # of its virtiofsd
    guest_path: str = ""


class DiskEntry(Struct, frozen=True, forbid_unknown_fields=True):
    disk_id: str
    slot: int
    path: str  # of a raw file, a block device, or the overlay over `base`
    base: str = ""
    read_only: bool = False
    host_device: bool = False
    kept: bool = False  # the overlay outlives the VM
    guest_path: str = ""


class NicEntry(Struct, frozen=True, forbid_unknown_fields=True):
    number: int  # of its tap, too
    slot: int
    interface: str
    tap: str
    mac: str
    mtu: int
    guest_path: str = ""


class DimmEntry(Struct, frozen=True, forbid_unknown_fields=True):
    number: int
    size_mib: int


class DeviceTable(Struct, frozen=True, forbid_unknown_fields=True):
    """A device is entered before it is attached, and leaves once it is detached. Changing it gives another table."""

    share: ShareEntry | None = None
    disks: tuple[DiskEntry, ...] = ()
    nics: tuple[NicEntry, ...] = ()
    dimms: tuple[DimmEntry, ...] = ()

    @property
    def slots(self) -> frozenset[int]:
        """Those that are taken."""
        share = {self.share.slot} if self.share is not None else set()
        return frozenset(share | {disk.slot for disk in self.disks} | {nic.slot for nic in self.nics})

    @property
    def plugged_mib(self) -> int:
        return sum(dimm.size_mib for dimm in self.dimms)

    def free_slot(self, slots: Iterable[int]) -> int | None:
        """The first of these that is not taken."""
        taken = self.slots
        return next((slot for slot in slots if slot not in taken), None)

    def disk(self, disk_id: str) -> DiskEntry | None:
        return next((disk for disk in self.disks if disk.disk_id == disk_id), None)

    def nic(self, number: int) -> NicEntry | None:
        return next((nic for nic in self.nics if nic.number == number), None)

    def with_share(self, share: ShareEntry) -> "DeviceTable":
        return replace(self, share=share)

    def with_disk(self, disk: DiskEntry) -> "DeviceTable":
        """In place of a former entry of that id."""
        return replace(self, disks=(*self.without_disk(disk.disk_id).disks, disk))

    def without_disk(self, disk_id: str) -> "DeviceTable":
        return replace(self, disks=tuple(disk for disk in self.disks if disk.disk_id != disk_id))

    def with_nic(self, nic: NicEntry) -> "DeviceTable":
        """In place of a former entry of that number."""
        return replace(self, nics=(*self.without_nic(nic.number).nics, nic))

    def without_nic(self, number: int) -> "DeviceTable":
        return replace(self, nics=tuple(nic for nic in self.nics if nic.number != number))

    def with_dimm(self, dimm: DimmEntry) -> "DeviceTable":
        return replace(self, dimms=(*self.without_dimm(dimm.number).dimms, dimm))

    def without_dimm(self, number: int) -> "DeviceTable":
        return replace(self, dimms=tuple(dimm for dimm in self.dimms if dimm.number != number))


class MemoryEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """The memory that a VM was started with, and what of it holds for its DIMMs."""

    mib: int
    max_mib: int  # with all that may be plugged
    hugepages: bool = False
    preallocated: bool = False


class DeviceRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """What is on disk about the devices of a sandbox's VM, in a file of its own: other processes than the supervisor
    change it, too.

    `generation` counts its writes. `unsettled`: a process that is not the supervisor is changing the table, or was
    killed when it did; whoever may change it next asks the VMM which of the devices are there.
    """

    generation: int
    table: DeviceTable
    memory: MemoryEntry
    unsettled: bool = False
