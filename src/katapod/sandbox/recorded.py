"""A sandbox by its record alone: what any process can ask of its VM and change, beside its supervisor.

The supervisor may be stopped by a signal; it takes notice when it goes on (devices.py). Nothing here speaks with the
guest's agent, which is the supervisor's: memory is brought online by the guest's kernel itself, a disk's new size is
seen by its driver, but a file system inside is not made larger, and nobody unmounts what is unplugged.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from katapod.host.cgroup import raise_limits
from katapod.host.direct_volumes import read_volume, size_of_device
from katapod.host.locks import is_stopped, lock_holder
from katapod.host.state import StateStore
from katapod.model.devices import DiskEntry
from katapod.model.errors import InvalidState, KatapodError, NotFound
from katapod.model.record import SandboxRecord, State
from katapod.plan.root_disk import root_disk_id
from katapod.sandbox.devices import Devices
from katapod.sandbox.plugged_memory import until_plugged
from katapod.sandbox.vmm_link import linked_vm
from katapod.vmm.devices import blocks_of
from katapod.vmm.protocol import VmControl, Vmm

__all__ = ["resize_disk", "resize_memory", "resize_volume", "stopped_supervisor", "unplug_disk", "unplug_nic"]

LOCK_LIMIT_S = 10.0


@contextlib.asynccontextmanager
async def _recorded(
    store: StateStore, sandbox_id: str, what: str, *, vmm: Vmm | None, limit_s: float
) -> AsyncIterator[tuple[SandboxRecord, Devices, VmControl]]:
    """Raises as linked_vm; InvalidState if the devices are not on record."""
    async with linked_vm(store, sandbox_id, what, limit_s, vmm) as link:
        found = link.file.read()
        if found is None:
            raise InvalidState(f"cannot {what}: its devices are not on record: a former version has started it")
        devices = Devices(link.control, found.memory)
        devices.file = link.file
        await devices.take_over(link.file)
        yield link.record, devices, link.control


def stopped_supervisor(store: StateStore, sandbox_id: str) -> int | None:
    """The supervisor's process if a signal has stopped it: it answers nobody then."""
    holder = lock_holder(store.layout.sandbox(sandbox_id).lock)
    return holder if holder is not None and is_stopped(holder) else None


async def resize_memory(
    store: StateStore, sandbox_id: str, mem_mib: int, *, vmm: Vmm | None = None, limit_s: float = LOCK_LIMIT_S
) -> int:
    """Plug memory until the guest has `mem_mib`, in blocks of MEMORY_BLOCK_MIB; returns what it has then.

    Raises InvalidState for less than it has, KatapodError for more than it can have, VmmRefused if VMM or guest do not
    take it, and as linked_vm.
    """
    what = f"resize {sandbox_id} to {mem_mib} MiB"
    async with _recorded(store, sandbox_id, what, vmm=vmm, limit_s=limit_s) as (record, devices, control):
        if mem_mib < devices.mem_mib:
            raise InvalidState(f"cannot {what}: it has {devices.mem_mib}, and memory is not taken out of a VM")
        more_mib = blocks_of(mem_mib - devices.mem_mib)
        if not more_mib:
            return devices.mem_mib
        if devices.mem_mib + more_mib > devices.max_mib:
            raise KatapodError(
                f"cannot {what}: its VM can have {devices.max_mib}",
                hint="raise default_maxmemory in configuration.toml",
            )
        raise_limits(record.cgroups, more_mib)
        dimms = devices.enter_memory(devices.mem_mib, more_mib)
        async with devices.unsettled():
            plugged = control.expect_memory(dimms[-1].number)
            await devices.attach_memory(dimms)
        await until_plugged(plugged, more_mib)
        return devices.mem_mib


async def resize_disk(
    store: StateStore,
    sandbox_id: str,
    path: str,
    size: int = 0,
    *,
    vmm: Vmm | None = None,
    limit_s: float = LOCK_LIMIT_S,
) -> int:
    """Have the guest see the size that the file or device `path` has by now; returns it, bytes.

    Raises NotFound if the VM has no such disk, KatapodError if it is smaller than `size`, and as linked_vm.
    """
    what = f"resize {path} of {sandbox_id}"
    async with _recorded(store, sandbox_id, what, vmm=vmm, limit_s=limit_s) as (_, devices, control):
        disk = next((each for each in devices.table.disks if each.path == path and not each.base), None)
        if disk is None:
            raise NotFound(f"cannot {what}: its VM has no such disk", hint=f"see: kata-runtime inspect {sandbox_id}")
        actual = await asyncio.to_thread(size_of_device, path)
        if actual < size:
            raise KatapodError(
                f"cannot {what} to {size} bytes: it has {actual}", hint="make the file or device larger first"
            )
        await control.resize_disk(disk.disk_id, actual)
        return actual


async def resize_volume(
    store: StateStore, sandbox_id: str, volume_path: str, size: int, *, vmm: Vmm | None = None
) -> int:
    """As resize_disk, of what is announced as the direct volume `volume_path`, whose file system stays as it is: only
    the supervisor can ask the agent for more. Raises SpecError, and as resize_disk."""
    info = read_volume(store.layout, volume_path)
    if info is None:
        raise NotFound(f"cannot find the direct volume {volume_path}", hint="see: kata-runtime direct-volume add")
    return await resize_disk(store, sandbox_id, info.device, size, vmm=vmm)


async def unplug_disk(
    store: StateStore, sandbox_id: str, disk_id: str, *, vmm: Vmm | None = None, limit_s: float = LOCK_LIMIT_S
) -> DiskEntry:
    """Take a disk out of the VM, once the guest's kernel has let go of it; returns what it was.

    Nobody unmounts it in the guest before. Raises NotFound, InvalidState for the root file system of a container that
    has not ended, VmmRefused if the guest keeps it, and as linked_vm.
    """
    what = f"unplug disk {disk_id} of {sandbox_id}"
    async with _recorded(store, sandbox_id, what, vmm=vmm, limit_s=limit_s) as (record, devices, _):
        disk = devices.table.disk(disk_id)
        if disk is None:
            raise NotFound(f"cannot {what}: it is not plugged", hint=f"see: kata-runtime inspect {sandbox_id}")
        for item in record.containers:
            if disk_id == root_disk_id(item.container_id) and item.state is not State.STOPPED:
                raise InvalidState(
                    f"cannot {what}: container {item.container_id}, whose root it is, is {item.state.value}"
                )
        async with devices.unsettled():
            await devices.remove_disk(disk)
        return disk


async def unplug_nic(
    store: StateStore, sandbox_id: str, interface: str, *, vmm: Vmm | None = None, limit_s: float = LOCK_LIMIT_S
) -> None:
    """Take the NIC that is `interface` in the pod's network namespace out of the VM, once the guest has let go of it.

    What was made in the namespace stays, until the interface goes or the sandbox ends. Raises NotFound, VmmRefused if
    the guest keeps it, and as linked_vm.
    """
    what = f"unplug {interface} of {sandbox_id}"
    async with _recorded(store, sandbox_id, what, vmm=vmm, limit_s=limit_s) as (_, devices, _):
        nic = next((each for each in devices.table.nics if each.interface == interface), None)
        if nic is None:
            raise NotFound(f"cannot {what}: it is not plugged", hint=f"see: kata-runtime inspect {sandbox_id}")
        async with devices.unsettled():
            await devices.remove_nic(nic.number)
