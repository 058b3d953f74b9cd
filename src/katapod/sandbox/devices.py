"""The devices of a sandbox's VM: its table and the VM change together, the table first.

A device is entered in the table, which goes to the record, then attached; it is detached, and then leaves the table. So
whoever finds the record finds every device in it that may be there.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from msgspec import structs

from katapod.model.devices import DeviceTable, DimmEntry, DiskEntry, NicEntry, ShareEntry
from katapod.model.errors import KatapodError
from katapod.plan.network import NicPlan
from katapod.vmm.devices import Disk as VmDisk
from katapod.vmm.devices import DiskSettings, Memory, Nic, SharedDirectory, dimm_sizes
from katapod.vmm.errors import VmmLinkBroken, VmmRefused
from katapod.vmm.protocol import Capabilities, VirtualMachine
from katapod.vmm.spec import VmSpec

__all__ = ["Devices"]


class Devices:
    """`note` is called with each new table, and has it on disk when it returns. What is entered by the enter methods
    is noted by the caller: at a sandbox's start all devices go to its record at once."""

    def __init__(
        self,
        vm: VirtualMachine,
        spec: VmSpec,
        capabilities: Capabilities,
        disks: DiskSettings,
        note: Callable[[DeviceTable], None] = lambda table: None,
    ) -> None:
        self.table = DeviceTable()
        self.note = note
        self._vm = vm
        self._spec = spec
        self._can = capabilities
        self._disks = disks

    # -- the table

    def enter_share(self, tag: str, socket: Path) -> None:
        self.table = self.table.with_share(ShareEntry(tag, self._can.share_slot, str(socket)))

    def enter_disk(
        self, disk_id: str, path: Path, *, base: Path | None = None, read_only: bool = False, host_device: bool = False
    ) -> DiskEntry:
        """A disk (a file, or a block device of the host), or with `base` an overlay at `path` over the disk `base`.

        Raises KatapodError if no slot is free.
        """
        slot = self.table.free_slot(self._can.disk_slots)
        if slot is None:
            raise KatapodError(
                f"cannot plug disk {disk_id}: all {len(self._can.disk_slots)} slots of the VM are taken",
                hint="raise default_bridges in configuration.toml, at most to 5",
            )
        below = str(base) if base is not None else ""
        entry = DiskEntry(disk_id, slot, str(path), base=below, read_only=read_only, host_device=host_device)
        self.table = self.table.with_disk(entry)
        return entry

    def enter_nic(self, nic: NicPlan) -> NicEntry:
        """Raises KatapodError if no slot is free."""
        interface = nic.interface
        slot = self.table.free_slot(self._can.nic_slots)
        if slot is None:
            raise KatapodError(
                f"cannot plug the interface {interface.name}: all slots for interfaces are taken",
                hint="raise default_bridges in configuration.toml, at most to 5",
            )
        entry = NicEntry(nic.number, slot, interface.name, nic.tap, interface.mac, interface.mtu)
        self.table = self.table.with_nic(entry)
        return entry

    def enter_memory(self, present_mib: int, more_mib: int) -> tuple[DimmEntry, ...]:
        """DIMMs that a guest with `present_mib` can take one after the other; none if nothing is wanted.

        Raises KatapodError if the VMM has no such thing.
        """
        if more_mib > 0 and not self._can.memory_hotplug:
            raise KatapodError(f"cannot plug {more_mib} MiB: this VMM adds no memory")
        first = len(self.table.dimms)
        dimms = tuple(DimmEntry(number, size) for number, size in enumerate(dimm_sizes(present_mib, more_mib), first))
        for dimm in dimms:
            self.table = self.table.with_dimm(dimm)
        return dimms

    # -- the VM. What is refused leaves the table

    async def attach_share(self, queue_size: int) -> None:
        """Raises VmmRefused, VmmLinkBroken."""
        entry = self.table.share
        assert entry is not None
        path = await self._vm.attach(SharedDirectory(entry.tag, Path(entry.socket), entry.slot, queue_size))
        self.table = self.table.with_share(structs.replace(entry, guest_path=path))

    async def attach_disk(self, disk_id: str) -> str:
        """Returns where the guest finds it. Raises VmmRefused, VmmLinkBroken; NoSpace, KatapodError for an overlay that
        cannot be made."""
        entry = self.table.disk(disk_id)
        assert entry is not None
        try:
            path = await self._vm.attach(self._disk(entry))
        except KatapodError as exc:
            if not isinstance(exc, VmmLinkBroken):
                self.table = self.table.without_disk(disk_id)
            raise
        self.table = self.table.with_disk(structs.replace(entry, guest_path=path))
        return path

    async def attach_nic(self, number: int, queues: Sequence[int], vhost: Sequence[int]) -> str:
        """With the descriptors of its tap. Returns where the guest finds it. Raises VmmRefused, VmmLinkBroken."""
        entry = self.table.nic(number)
        assert entry is not None
        try:
            device = Nic(number, entry.mac, entry.slot, entry.tap, entry.mtu, queues, vhost)
            path = await self._vm.attach(device)
        except VmmRefused:
            self.table = self.table.without_nic(number)
            raise
        self.table = self.table.with_nic(structs.replace(entry, guest_path=path))
        return path

    async def attach_memory(self, dimms: Iterable[DimmEntry]) -> None:
        """Raises VmmRefused, VmmLinkBroken; the DIMMs before the one that failed stay."""
        spec = self._spec
        left = list(dimms)
        try:
            while left:
                await self._vm.attach(
                    Memory(left[0].number, left[0].size_mib, hugepages=spec.hugepages, preallocated=spec.preallocated)
                )
                del left[0]
        except VmmRefused:
            for dimm in left:
                self.table = self.table.without_dimm(dimm.number)
            raise

    # -- both, and the record: what comes and goes while the sandbox runs

    async def add_disk(
        self, disk_id: str, path: Path, *, base: Path | None = None, read_only: bool = False, host_device: bool = False
    ) -> str:
        """As enter_disk, then attach_disk. Raises as they do."""
        if not self._can.hotplug:
            raise KatapodError(f"cannot plug disk {disk_id}: this VMM takes none while its guest runs")
        before = self.table
        self.enter_disk(disk_id, path, base=base, read_only=read_only, host_device=host_device)
        self._note(before)
        try:
            return await self.attach_disk(disk_id)
        finally:
            self.note(self.table)

    async def remove_disk(self, entry: DiskEntry) -> None:
        """Once the guest has let go of it. Raises VmmRefused, VmmLinkBroken; then it may be called again."""
        await self._vm.detach(self._disk(entry))
        self.table = self.table.without_disk(entry.disk_id)
        self.note(self.table)

    async def remove_nic(self, number: int) -> None:
        """Likewise."""
        entry = self.table.nic(number)
        if entry is not None:
            await self._vm.detach(Nic(number, entry.mac, entry.slot))
            self.table = self.table.without_nic(number)
            self.note(self.table)

    def _note(self, before: DeviceTable) -> None:
        """What cannot be recorded is not acquired."""
        try:
            self.note(self.table)
        except BaseException:
            self.table = before
            raise

    def _disk(self, entry: DiskEntry) -> VmDisk:
        return VmDisk(
            entry.disk_id,
            Path(entry.path),
            entry.slot,
            read_only=entry.read_only,
            host_device=entry.host_device,
            base=Path(entry.base) if entry.base else None,
            settings=self._disks,
        )
