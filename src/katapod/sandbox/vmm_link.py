"""The VM of a sandbox that another process runs: found by its record, reached by the VMM's second connection."""

import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from msgspec import Struct

from katapod.host.device_file import DeviceFile
from katapod.host.state import StateStore, supervisor_alive
from katapod.model.errors import InvalidState, NotFound
from katapod.model.record import SandboxRecord, State
from katapod.sandbox.vmms import vmm_of
from katapod.vmm.protocol import VmControl, Vmm
from katapod.vmm.spec import Accelerator

if TYPE_CHECKING:
    from katapod.model.inspection import Hypervisor, Missing

__all__ = ["VmLink", "ask_vmm", "linked_vm", "vmm_of_record"]

CONNECT_LIMIT_S = 5.0


class VmLink(Struct, frozen=True):
    record: SandboxRecord
    file: DeviceFile
    control: VmControl


def vmm_of_record(record: SandboxRecord) -> Vmm:
    return vmm_of(Accelerator(record.accelerator or Accelerator.TCG.value))


@contextlib.asynccontextmanager
async def linked_vm(
    store: StateStore, sandbox_id: str, what: str, limit_s: float, vmm: Vmm | None = None
) -> AsyncIterator[VmLink]:
    """Have the devices of a sandbox to ourselves, and a connection to its VM, while the block runs.

    Raises NotFound, InvalidState ("cannot `what`: ...") if it does not run, LockTaken if another process is at its
    devices for `limit_s`, VmmRefused if its VMM takes no such connection, VmmLinkBroken.
    """
    _running(store, sandbox_id, what)
    file = DeviceFile(store.layout.sandbox(sandbox_id))
    async with contextlib.AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(file.locked(limit_s, what))
        except FileNotFoundError as exc:
            raise NotFound(f"cannot {what}: it has ended, and is removed") from exc
        record = _running(store, sandbox_id, what)  # it may have ended meanwhile
        vm_dir = store.layout.sandbox(sandbox_id, record.machine_id).vm
        control = await stack.enter_async_context((vmm or vmm_of_record(record)).connect(vm_dir, CONNECT_LIMIT_S))
        yield VmLink(record, file, control)


def _running(store: StateStore, sandbox_id: str, what: str) -> SandboxRecord:
    """Raises NotFound, InvalidState, KatapodError for a record that cannot be read."""
    record = store.read(sandbox_id)
    if record.pooled:
        raise InvalidState(f"cannot {what}: it is an idle machine of the pool")
    if record.state not in (State.RUNNING, State.PAUSED):
        raise InvalidState(f"cannot {what}: it is {record.state.value}; needs running")
    if not supervisor_alive(store.layout.sandbox(sandbox_id)):
        raise InvalidState(f"cannot {what}: the process that ran it was killed, and its VM with it")
    return record


async def ask_vmm(
    store: StateStore, sandbox_id: str, limit_s: float, *, vmm: Vmm | None = None
) -> "tuple[Hypervisor | None, list[Missing]]":
    """What the VMM says of the VM. Raises as linked_vm."""
    async with linked_vm(store, sandbox_id, f"ask the VMM of {sandbox_id}", limit_s, vmm) as link:
        return await link.control.facts(limit_s)
