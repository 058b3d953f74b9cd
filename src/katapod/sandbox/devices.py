"""The devices of a sandbox's VM: its table and the VM change together, the table first.

A device is entered in the table, which goes to disk, then attached; it is detached, and then leaves the table. So
whoever finds the table finds every device in it that may be there.

While a sandbox runs its table is changed in changing() only: by one process at a time, which begins with what others
have made of the table since.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path

from msgspec import structs

from katapod.host.device_file import DeviceFile
from katapod.model.devices import DeviceRecord, DeviceTable, DimmEntry, DiskEntry, MemoryEntry, NicEntry, ShareEntry
from katapod.model.errors import KatapodError
from katapod.plan.network import NicPlan
from katapod.vmm.devices import DEFAULT_DISKS, DiskSettings, Memory, Nic, SharedDirectory, dimm_sizes
from katapod.vmm.devices import Disk as VmDisk
from katapod.vmm.errors import VmmLinkBroken, VmmRefused
from katapod.vmm.protocol import Capabilities, VmControl

__all__ = ["LOCK_LIMIT_S", "Devices"]

log = logging.getLogger(__name__)

LOCK_LIMIT_S = 30.0  # longer than a guest may take to let go of a device
NO_ROOM = Capabilities(disk_slots=(), nic_slots=(), share_slot=0)


class Devices:
    """`file` has the table on disk once the sandbox runs. What is entered by the enter methods is noted by the caller:
    at a sandbox's start all devices go to disk at once."""

    def __init__(
        self,
        vm: VmControl,
        memory: MemoryEntry,
        capabilities: Capabilities = NO_ROOM,
        disks: DiskSettings = DEFAULT_DISKS,
    ) -> None:
        self.table = DeviceTable()
        self.file: DeviceFile | None = None
        self.changed: Callable[[DeviceTable], None] = lambda before: None  # another process has changed the table
        self._vm = vm
        self._memory = memory
        self._can = capabilities
        self._disks = disks
        self._generation = 0
        self._unsettled = False
        self._holders = 0
        self._gate = asyncio.Lock()
        self._lock: contextlib.AsyncExitStack | None = None  # held while there are holders

    def next_record(self) -> DeviceRecord:
        """What is to be written next."""
        self._generation += 1
        return DeviceRecord(self._generation, self.table, self._memory, self._unsettled)

    @property
    def mem_mib(self) -> int:
        """Memory of the guest, with what is plugged."""
        return self._memory.mib + self.table.plugged_mib

    @property
    def max_mib(self) -> int:
        return self._memory.max_mib

    def note(self) -> None:
        """Have the table on disk. Raises NoSpace, KatapodError."""
        if self.file is not None:
            self.file.write(self.next_record())

    # -- beside other processes

    @contextlib.asynccontextmanager
    async def changing(self) -> AsyncIterator[None]:
        """Let nobody but this process change the devices while the block runs, which has the table that others have
        left. Blocks of one process run side by side. Raises LockTaken, KatapodError."""
        self._holders += 1
        try:
            async with self._gate:
                if self._lock is None and self.file is not None:
                    await self._take_lock(self.file)
            yield
        finally:
            self._holders -= 1
            if self._holders == 0 and self._lock is not None:
                lock, self._lock = self._lock, None
                await lock.aclose()

    async def _take_lock(self, file: DeviceFile) -> None:
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(file.locked(LOCK_LIMIT_S, "change the devices of the VM"))
            await self.take_over(file)
            self._lock = stack.pop_all()

    async def take_over(self, file: DeviceFile) -> None:
        """Go on with what is on disk; if its writer was killed in a change, with what of it is there. The caller has
        the lock. Raises KatapodError."""
        found = file.read()
        if found is None or found.generation == self._generation:
            return
        before, self.table = self.table, found.table
        if found.unsettled:
            try:
                await self._settle()
            except BaseException:
                self.table = before  # the next one who has the lock tries again
                raise
        self._generation = found.generation
        if found.unsettled:
            self.note()
        self.changed(before)

    async def _settle(self) -> None:
        """Drop the entries of what is not there. Raises VmmRefused, VmmLinkBroken."""
        for disk in self.table.disks:
            if not await self._vm.settle(self._disk(disk)):
                self.table = self.table.without_disk(disk.disk_id)
        for nic in self.table.nics:
            if not await self._vm.settle(Nic(nic.number, nic.mac, nic.slot)):
                self.table = self.table.without_nic(nic.number)
        for dimm in self.table.dimms:
            if not await self._vm.settle(self._dimm(dimm)):
                self.table = self.table.without_dimm(dimm.number)

    @contextlib.asynccontextmanager
    async def unsettled(self) -> AsyncIterator[None]:
        """For a process that may end while the VM goes on: whoever comes after it hears if it has not got done."""
        self._unsettled = True
        self.note()
        try:
            yield
        except VmmRefused:
            await self._settle()
            self.note()  # still unsettled: the guest may let go of a device later
            raise
        self._unsettled = False
        self.note()

    # -- the table

    def enter_share(self, tag: str, socket: Path) -> None:
        self.table = self.table.with_share(ShareEntry(tag, self._can.share_slot, str(socket)))

    def enter_disk(
        self,
        disk_id: str,
        path: Path,
        *,
        base: Path | None = None,
        kept: bool = False,
        read_only: bool = False,
        host_device: bool = False,
    ) -> DiskEntry:
        """A disk (a file, or a block device of the host), or with `base` an overlay at `path` over the disk `base`,
        which may be `kept` when the VM ends.

        Raises KatapodError if no slot is free.
        """
        slot = self.table.free_slot(self._can.disk_slots)
        if slot is None:
            raise KatapodError(
                f"cannot plug disk {disk_id}: all {len(self._can.disk_slots)} slots of the VM are taken",
                hint=self._can.more_slots,
            )
        below = str(base) if base is not None else ""
        entry = DiskEntry(disk_id, slot, str(path), base=below, read_only=read_only, host_device=host_device, kept=kept)
        self.table = self.table.with_disk(entry)
        return entry

    def enter_nic(self, nic: NicPlan) -> NicEntry:
        """Raises KatapodError if no slot is free."""
        interface = nic.interface
        slot = self.table.free_slot(self._can.nic_slots)
        if slot is None:
            raise KatapodError(
                f"cannot plug the interface {interface.name}: all slots for interfaces are taken",
                hint=self._can.more_slots,
            )
        entry = NicEntry(nic.number, slot, interface.name, nic.tap, interface.mac, interface.mtu)
        self.table = self.table.with_nic(entry)
        return entry

    def enter_memory(self, present_mib: int, more_mib: int) -> tuple[DimmEntry, ...]:
        """DIMMs that a guest with `present_mib` can take one after the other; none if nothing is wanted.

        Raises KatapodError if the VMM has no such thing.
        """
        if more_mib > 0 and not self._can.memory_hotplug:
            raise KatapodError(
                f"cannot plug {more_mib} MiB beside the {present_mib} of the sandbox: this VMM adds no memory to a "
                "guest that runs",
                hint="raise default_memory, lower the containers' limits, or use another accelerator, as tcg",
            )
        first = max((dimm.number + 1 for dimm in self.table.dimms), default=0)
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
        left = list(dimms)
        try:
            while left:
                await self._vm.attach(self._dimm(left[0]))
                del left[0]
        except VmmRefused:
            for dimm in left:
                self.table = self.table.without_dimm(dimm.number)
            raise

    # -- both, and the file: what comes and goes while the sandbox runs. The caller is in changing()

    async def add_disk(
        self,
        disk_id: str,
        path: Path,
        *,
        base: Path | None = None,
        kept: bool = False,
        read_only: bool = False,
        host_device: bool = False,
    ) -> str:
        """As enter_disk, then attach_disk. Raises as they do."""
        if not self._can.hotplug:
            raise KatapodError(f"cannot plug disk {disk_id}: this VMM takes none while its guest runs")
        before = self.table
        self.enter_disk(disk_id, path, base=base, kept=kept, read_only=read_only, host_device=host_device)
        self._note(before)
        try:
            return await self.attach_disk(disk_id)
        finally:
            self.note()

    async def add_share(self, tag: str, socket: Path, queue_size: int) -> None:
        """As enter_share, then attach_share. Raises KatapodError, VmmRefused, VmmLinkBroken; then it is not there."""
        if not self._can.hotplug:
            raise KatapodError("cannot plug the shared directory: this VMM takes none while its guest runs")
        before = self.table
        self.enter_share(tag, socket)
        self._note(before)
        try:
            await self.attach_share(queue_size)
        except KatapodError as exc:
            if not isinstance(exc, VmmLinkBroken):
                self.table = structs.replace(self.table, share=None)
            raise
        finally:
            self.note()

    async def add_memory(self, more_mib: int) -> None:
        """As enter_memory, then attach_memory; the guest may not use it yet. Raises as they do."""
        before = self.table
        dimms = self.enter_memory(self.mem_mib, more_mib)
        self._note(before)
        try:
            await self.attach_memory(dimms)
        except VmmRefused:
            self.note()
            raise

    async def remove_disk(self, entry: DiskEntry) -> None:
        """Once the guest has let go of it. Raises VmmRefused, VmmLinkBroken; then it may be called again."""
        await self._vm.detach(self._disk(entry))
        self.table = self.table.without_disk(entry.disk_id)
        self.note()

    async def remove_nic(self, number: int) -> None:
        """Likewise."""
        entry = self.table.nic(number)
        if entry is not None:
            await self._vm.detach(Nic(number, entry.mac, entry.slot))
            self.table = self.table.without_nic(number)
            self.note()

    def _note(self, before: DeviceTable) -> None:
        """What cannot be recorded is not acquired."""
        try:
            self.note()
        except BaseException:
            self.table = before
            raise

    def _dimm(self, entry: DimmEntry) -> Memory:
        memory = self._memory
        return Memory(entry.number, entry.size_mib, hugepages=memory.hugepages, preallocated=memory.preallocated)

    def _disk(self, entry: DiskEntry) -> VmDisk:
        return VmDisk(
            entry.disk_id,
            Path(entry.path),
            entry.slot,
            read_only=entry.read_only,
            host_device=entry.host_device,
            base=Path(entry.base) if entry.base else None,
            kept=entry.kept,
            settings=self._disks,
        )
