"""A machine kept ready: started under a name of its own, and standing still until a sandbox takes it.

Until then it is a sandbox like any other to those who clean up: its record (`pooled`) is locked by its supervisor, its
directories carry its id. With the taking its record ends; that of the sandbox names the machine (`machine_id`).
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
from msgspec.structs import replace

from katapod.host.netns import netns_inode
from katapod.host.removal import clear_away
from katapod.host.state import StateStore
from katapod.model.errors import KatapodError
from katapod.model.ids import new_id, short_id
from katapod.sandbox.adapting import adapt_machine, roused
from katapod.sandbox.container import ContainerPlan, create_container
from katapod.sandbox.guard import guarded
from katapod.sandbox.lifecycle import Sandbox, start_machine
from katapod.sandbox.machine import Machine
from katapod.sandbox.planning import SandboxPlan
from katapod.sandbox.recovery import remove_sandbox
from katapod.sandbox.release import ReleaseStack
from katapod.sandbox.start_record import StartRecord
from katapod.sandbox.stdio import NullSink
from katapod.tasks import finish
from katapod.vmm.errors import VmmLinkBroken, VmmRefused
from katapod.vmm.protocol import VmmLogs

__all__ = ["ReadyMachine", "new_machine_id", "ready_machine", "warm_up"]

log = logging.getLogger(__name__)

LOG_NAMES = ("console.log", "vmm.log", "virtiofsd.log")


def new_machine_id() -> str:
    return f"pool-{short_id(new_id())}"


class ReadyMachine:
    """Owned by this process. It is taken once, or closed."""

    # long: what it is made of, each of another kind
    def __init__(
        self,
        plan: SandboxPlan,
        store: StateStore,
        machine: Machine,
        stack: ReleaseStack,
        lock: int,
        netns: int | None = None,
    ) -> None:
        self.plan = plan
        self.store = store
        self.machine = machine
        self.netns = netns  # of a VMM that opens taps in its own, into which the sandbox's network has to come
        self._stack = stack
        self._lock = lock  # of its record, -1 once that is gone
        self._rousing: asyncio.Task[None] | None = None

    @property
    def machine_id(self) -> str:
        return self.plan.record.sandbox_id

    @property
    def cgroups(self) -> tuple[str, ...]:
        """Those of its VMM, which go with it; their limit is of its size, as that of a sandbox which it fits."""
        return self.plan.record.cgroups

    @property
    def gone(self) -> bool:
        """Taken or closed."""
        return self._lock < 0

    def fits(self, plan: SandboxPlan) -> bool:
        """Whether the sandbox would get the machine that a new start would give it. It can grow, where its VMM adds
        memory and vCPUs, and not shrink."""
        return (
            not self.gone
            and self.plan.machine_key != ""
            and _kind(self.plan) == _kind(plan)
            and _grows_to(plan, self.machine)
            and (self.netns is None or plan.netns is None or netns_inode(plan.netns) == os.fstat(self.netns).st_ino)
        )

    async def pause(self) -> None:
        """Let the guest stand still: it uses no CPU then. Raises VmmRefused, KatapodError."""
        await guarded(self.machine.vm.pause(), self.machine.death, self.machine_id)

    @contextlib.asynccontextmanager
    async def asked_for(self) -> AsyncIterator[None]:
        """Somebody wants it, and in the block finds out whether it fits: what can be done ahead is begun."""
        async with roused(self.machine, self.plan) as self._rousing:
            yield

    async def take_over(self, plan: SandboxPlan, stack: ReleaseStack, note: StartRecord) -> Machine:
        """Make the machine the sandbox's own, whose record, `note`, names it; its releases go to `stack`.

        Raises AgentFailed, KatapodError.
        """
        assert plan.record.machine_id == self.machine_id
        note(vmm_pid=self.machine.vm.pid)  # first of all: whoever cleans up after the sandbox must find the machine
        self._move_logs(self.store.layout.sandbox(plan.record.sandbox_id, self.machine_id).state)
        networks = await stack.enter_async_context(ReleaseStack())  # released once the VMM has ended
        stack.push_async_callback(self._stack.aclose)
        self._drop_record()
        return await adapt_machine(self.machine, self.plan, plan, networks, stack, note, self._rousing)

    def _move_logs(self, target: Path) -> None:
        source = self.store.layout.sandbox(self.machine_id).state
        for name in LOG_NAMES:
            for part in (name, f"{name}.1"):  # the older half of a BoundedLog
                with contextlib.suppress(FileNotFoundError):
                    os.rename(source / part, target / part)
        vm = self.machine.vm
        vm.logs = VmmLogs(target / vm.logs.console.name, target / vm.logs.vmm.name, vm.logs.limit_bytes)
        self.machine.share.move_log(target)

    def _drop_record(self) -> None:
        self.store.discard(self.machine_id)
        os.close(self._lock)
        self._lock = -1

    async def close(self) -> None:
        """End the machine and remove all of it, unless it has been taken. Idempotent; runs to its end."""
        if not self.gone:
            await finish(self._close(), name="close-machine")

    async def _close(self) -> None:
        lock, self._lock = self._lock, -1
        self.machine.vm.stopping = self.machine.share.stopping = True
        try:
            with contextlib.suppress(VmmRefused, VmmLinkBroken):
                await self.machine.vm.stop(soft=False)  # nothing in it has to be written out
            await self._stack.aclose()
        finally:
            await remove_sandbox(self.store, self.machine_id)
            os.close(lock)


@contextlib.asynccontextmanager
async def ready_machine(plan: SandboxPlan, store: StateStore) -> AsyncIterator[ReadyMachine]:
    """Start a machine under the record of `plan`; it runs. What nobody has taken is removed with the block.

    Raises KatapodError; then nothing of it is left.
    """
    plan = replace(plan, record=msgspec.structs.replace(plan.record, pooled=True, auto_remove=True))
    lock = store.create(plan.record)
    stack = ReleaseStack()
    try:
        machine = await start_machine(plan, store, stack, StartRecord(store, plan.record))
    except BaseException:
        await finish(_unwind(stack, store, plan.record.sandbox_id), name="machine-unwind")
        os.close(lock)
        raise
    ready = ReadyMachine(plan, store, machine, stack, lock)
    try:
        if plan.vmm.capabilities(plan.vm).taps_by_name:
            ready.netns = _netns_of(machine.vm.pid)
            stack.callback(os.close, ready.netns)
        yield ready
    finally:
        await ready.close()


async def warm_up(ready: ReadyMachine, plan: ContainerPlan) -> None:
    """Run a container to its end, of which nothing stays but what became warm: code that the VMM has translated, files
    that the guest has read, modules that its agent has loaded. Raises KatapodError."""
    sandbox = Sandbox(ready.plan, ready.store, ready.machine)
    data = sandbox.paths.data
    sandbox.paths.layers.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        container = await create_container(sandbox, plan)
        await container.start()
        await container.carry(None, NullSink(), NullSink())
        await container.remove()
    finally:
        clear_away(ready.store.layout, data)


async def _unwind(stack: ReleaseStack, store: StateStore, machine_id: str) -> None:
    try:
        await stack.aclose()
        await remove_sandbox(store, machine_id)
    except (ExceptionGroup, KatapodError) as exc:  # beside the first cause, which is what the caller gets
        log.error("machine %s: %s", machine_id, exc)


def _netns_of(pid: int) -> int:
    """Raises KatapodError."""
    try:
        return os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise KatapodError(f"cannot open the network namespace of process {pid}: {exc.strerror}") from exc


def _grows_to(plan: SandboxPlan, machine: Machine) -> bool:
    can = plan.vmm.capabilities(plan.vm)
    more_mib, more_vcpus = plan.vm.mem_mib - machine.mem_mib, plan.vm.vcpus - machine.spec.vcpus
    return (more_mib == 0 or (more_mib > 0 and can.memory_hotplug)) and (
        more_vcpus == 0 or (more_vcpus > 0 and can.vcpu_hotplug)
    )


def _kind(plan: SandboxPlan) -> tuple[object, ...]:
    """What two machines must have in common for one to stand in for the other; their sizes are another matter."""
    return (
        plan.vmm,
        plan.machine_key,
        plan.template is None,
        replace(plan.virtiofsd, shared_dir=Path(), implementation=None),
        plan.virtio_fs_queue_size,
        plan.dns,
        plan.kernel_modules,
        plan.guest_hook_path,
        plan.bind_mounts,
        (plan.vm.preallocated, plan.vm.hugepages),
        plan.console_limit_bytes,
    )
