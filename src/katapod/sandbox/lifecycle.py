"""A sandbox from its first record on disk to its last file removed.

`start_sandbox` acquires in one order, each step with its release; success hands the stack of releases to
the Sandbox, failure unwinds it. From then on watchers tell why a sandbox died: the first cause wins.
"""

import asyncio
import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
from msgspec.structs import replace

from katapod.host.device_file import DeviceFile
from katapod.host.hints import hint_for
from katapod.host.loopback_guard import guard_loopback
from katapod.host.mounts import bind, export_directory
from katapod.host.removal import clear_away
from katapod.host.state import StateStore
from katapod.host.trace import GUEST, add_span, span
from katapod.host.trace import enabled as trace_enabled
from katapod.host.turns import STARTS_A_CPU, turn
from katapod.model.devices import DeviceTable
from katapod.model.errors import KatapodError, NoSpace, NotFound
from katapod.model.layout import SANDBOX_MOUNTS, SHARE_TAG, Layout, SandboxPaths
from katapod.model.mount_options import Access
from katapod.model.record import State
from katapod.rpc.pb import agent_pb2
from katapod.rpc.status import RpcError
from katapod.sandbox.clock import ClockKeeper
from katapod.sandbox.console import ConsoleLink
from katapod.sandbox.direct_volumes import DirectVolumes
from katapod.sandbox.failures import doubting, watch_doubts
from katapod.sandbox.guard import guarded
from katapod.sandbox.health import declare_dead, watch_health
from katapod.sandbox.machine import Machine, answer_of, running_machine
from katapod.sandbox.names import LoopbackNames
from katapod.sandbox.planning import SandboxPlan
from katapod.sandbox.release import ReleaseStack
from katapod.sandbox.share import late_share_storage
from katapod.sandbox.shared_volumes import SharedVolumes
from katapod.sandbox.start_record import Attaching, StartRecord
from katapod.tasks import beside, finish
from katapod.vmm.devices import blocks_of
from katapod.vmm.protocol import DiskError

__all__ = ["Sandbox", "start_sandbox", "start_machine"]

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

DESTROY_LIMIT_S = 5.0
SPACE_FLOOR_MIB = 16  # below this a start would only fail later, with a less clear error


class StartedMachine(Protocol):
    """pool.ReadyMachine: a machine of its own name that a sandbox may take over."""

    @property
    def machine_id(self) -> str: ...
    @property
    def cgroups(self) -> tuple[str, ...]: ...
    def fits(self, plan: SandboxPlan) -> bool: ...
    async def take_over(self, plan: SandboxPlan, stack: ReleaseStack, note: StartRecord) -> Machine: ...
    async def close(self) -> None: ...


class Sandbox:
    """A live sandbox, owned by this process."""

    def __init__(
        self,
        plan: SandboxPlan,
        store: StateStore,
        machine: Machine,
    ) -> None:
        self.plan = plan
        self.store = store
        self.record = plan.record
        self.vm = machine.vm
        self.share = machine.share
        self.agent = machine.agent
        self.death = machine.death
        self.guest_vcpus = machine.spec.vcpus
        self.devices = machine.devices
        self.devices.file = DeviceFile(store.layout.sandbox(self.sandbox_id))
        self.devices.changed = self._take_notice
        self._told_disks: set[str] = set()  # whose errors have been logged
        machine.vm.on_disk_error(self.take_disk_error)
        self.network = machine.network
        self.direct_volumes = DirectVolumes()
        self.volumes = SharedVolumes(self.paths.mounts)
        self.vsock_cid = machine.spec.vsock_cid  # None: the agent has a serial port
        self.console = ConsoleLink(
            self.sandbox_id, machine.vm, machine.spec.vsock_cid, enabled=machine.spec.debug_console
        )
        self.clock = ClockKeeper(machine.agent, self.sandbox_id)
        self.names = LoopbackNames(machine.agent, self.sandbox_id)
        self._resizing = machine.resizing
        self._cgroup = machine.cgroup
        self.afterwards = contextlib.AsyncExitStack()  # closed when the VM has ended, by whoever has opened the sandbox
        self._stack = contextlib.AsyncExitStack()
        self._closed = False
        self._network_lock = asyncio.Lock()
        self._share_lock = asyncio.Lock()

    @property
    def sandbox_id(self) -> str:
        return self.record.sandbox_id

    @property
    def guest_mem_mib(self) -> int:
        return self.devices.mem_mib

    def has_disk(self, disk_id: str) -> bool:
        """Whether the guest has it, or the VMM can give it to it."""
        can = self.plan.vmm.capabilities(self.plan.vm)
        return bool(self.disk_path(disk_id)) or bool(can.disk_slots and can.hotplug)

    @property
    def _agent_lets_go(self) -> bool:
        return self.plan.vmm.capabilities(self.plan.vm).agent_lets_go

    @property
    def closing(self) -> bool:
        return self._closed

    @property
    def paths(self) -> SandboxPaths:
        return self.store.layout.sandbox(self.sandbox_id, self.record.machine_id)

    def save(self, **changes: Any) -> None:
        """Change the record, on disk too."""
        self.record = msgspec.structs.replace(self.record, **changes)
        self.store.write(self.record)

    async def guard(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Await `work`; if the sandbox dies meanwhile raise why it died instead of what came of that.

        Raises AgentFailed for an error of the agent, KatapodError for the death.
        """
        return await guarded(work, self.death, self.sandbox_id)

    async def add_disk(
        self,
        disk_id: str,
        path: os.PathLike[str],
        *,
        read_only: bool,
        base: os.PathLike[str] | None = None,
        kept: bool = False,
        host_device: bool = False,
    ) -> str:
        """Plug a disk (a file, or a block device of the host), or with `base` an overlay at `path` over that disk,
        which is `kept` when the VM ends. Returns its guest PCI path.

        Raises VmmRefused, KatapodError if the VM has no room for it.
        """
        below = Path(base) if base is not None else None
        async with self.devices.changing():
            return await self.guard(
                self.devices.add_disk(
                    disk_id, Path(path), base=below, kept=kept, read_only=read_only, host_device=host_device
                )
            )

    async def open_share(self) -> None:
        """Have a shared directory, if there is none yet. Raises VmmRefused, VirtiofsdFailed, MissingProgram;
        KatapodError if the VMM takes none while its guest runs."""
        async with self._share_lock, self.devices.changing():
            if self.devices.table.share is not None:
                return
            with span("plug the shared directory"):
                async with self.share.opening():
                    size = self.plan.virtio_fs_queue_size
                    await self.guard(self.devices.add_share(SHARE_TAG, self.share.socket, size))

    @property
    def share_storages(self) -> tuple[agent_pb2.Storage, ...]:
        """What the agent has to mount for a container whose files are in the shared directory."""
        entry = self.devices.table.share
        return () if self.share.mounted or entry is None else (late_share_storage(entry.guest_path),)

    def _take_notice(self, before: DeviceTable) -> None:
        """Another process has changed the devices, while this one was stopped or had nothing to do with them."""
        log.info("another process has changed the devices of the VM")
        if self.network is not None:
            for nic in before.nics:
                if self.devices.table.nic(nic.number) is None:
                    self.network.forget_plugged(nic.number)
        if self._cgroup is not None:
            self._cgroup.allow(self.guest_mem_mib)
        self.save(mem_mib=self.guest_mem_mib)

    def disk_path(self, disk_id: str) -> str:
        """Where the guest finds a disk that is plugged; empty if there is none of that id."""
        disk = self.devices.table.disk(disk_id)
        return disk.guest_path if disk is not None else ""

    def take_disk_error(self, error: DiskError) -> None:
        """If the VMM has stopped the guest for it, the sandbox is dead: what it wrote could not be kept, and its
        programs would never hear of it. Otherwise the guest was told, and the record says so."""
        disk = self.devices.table.disk(error.disk_id)
        path = disk.path if disk is not None else f"disk {error.disk_id[:64]!r}"
        verb = "write" if error.writing else "read"
        cause = f"cannot {verb} {path}: {os.strerror(errno.ENOSPC if error.full else errno.EIO)}"
        if error.stopped:
            kind = NoSpace if error.full else KatapodError
            declare_dead(
                self,
                kind(
                    f"sandbox {self.sandbox_id} was ended: the host {cause}",
                    hint="free some space on that file system"
                    if error.full
                    else "look for the cause in the host's dmesg",
                ),
            )
        elif path not in self._told_disks:
            self._told_disks.add(path)
            log.warning("the host %s; the guest was told", cause)
            with contextlib.suppress(KatapodError):
                self.save(error=f"the host {cause}")

    async def remove_disk(self, disk_id: str) -> None:
        """Take a disk out, once the guest has let go of it. Raises VmmRefused; NotFound if it is not plugged."""
        async with self.devices.changing():
            disk = self.devices.table.disk(disk_id)
            if disk is None:
                raise NotFound(f"cannot unplug disk {disk_id}: it is not plugged")
            if self._agent_lets_go:
                await self.guard(self.agent.let_go(disk=disk.guest_path))
            await self.guard(self.devices.remove_disk(disk))

    async def resize_disk(self, disk_id: str, size: int) -> None:
        """Have the guest see that the file of a disk has `size` bytes by now. Raises VmmRefused."""
        async with self.devices.changing():
            await self.guard(self.vm.resize_disk(disk_id, size))

    async def rescan_network(self) -> bool:
        """Give the guest the interfaces that came to the pod since, take away those that went, and tell it of
        addresses and routes that have changed.

        Returns whether anything changed. Raises KatapodError.
        """
        network = self.network
        if network is None:
            return False
        async with self._network_lock, self.devices.changing():
            routes = network.routes
            gone, new, changed = await network.compare()
            for nic in gone:
                if self._agent_lets_go:
                    await self.guard(self.agent.let_go(mac=nic.interface.mac))
                await self.guard(self.devices.remove_nic(nic.number))
                await network.detach(nic)
            told = [await network.take_change(interface) for interface in changed]
            if new:
                await guard_loopback(new)
            for interface in new:
                nic = await network.attach(interface)
                try:
                    await self.guard(network.add(self.devices, nic))
                except BaseException:
                    await network.detach(nic)
                    raise
                told.append(nic)
            moved = network.routes != routes
            if told or moved:
                await self.guard(network.tell_guest(self.agent, tuple(told)))
            return bool(gone or told or moved)

    async def resize(self, *, vcpus: int, mem_mib: int) -> None:
        """Plug vCPUs and memory until the guest has at least these; it never shrinks.

        Memory comes in blocks of MEMORY_BLOCK_MIB. Raises VmmRefused, AgentFailed, KatapodError.
        """
        async with self.devices.changing():
            await self._resize(vcpus, mem_mib)

    async def _resize(self, vcpus: int, mem_mib: int) -> None:
        more_cpus = vcpus - self.guest_vcpus
        more_mib = blocks_of(mem_mib - self.guest_mem_mib)
        can = self.plan.vmm.capabilities(self.plan.vm)
        if more_cpus > 0 and not can.vcpu_hotplug:
            raise KatapodError(
                f"cannot add {more_cpus} vCPUs to the {self.guest_vcpus} of the sandbox: this VMM adds none to a guest "
                "that runs",
                hint="lower the CPU limits, or use another accelerator",
            )
        if self._cgroup is not None and more_mib > 0 and can.memory_hotplug:
            self._cgroup.allow(self.guest_mem_mib + more_mib)
        if more_cpus > 0:
            await self.guard(self.vm.add_vcpus(more_cpus))
            self.guest_vcpus = vcpus
            await self.place_vcpus()
        if more_mib > 0:
            await self.guard(self.devices.add_memory(more_mib))
        if more_cpus > 0 or more_mib > 0:
            request = agent_pb2.OnlineCPUMemRequest(wait=True, nb_cpus=max(0, more_cpus), cpu_only=more_mib <= 0)
            await self.guard(self.agent.call("OnlineCPUMem", request))
            self.save(vcpus=self.guest_vcpus, mem_mib=self.guest_mem_mib)

    async def place_vcpus(self) -> None:
        """Put the vCPUs' threads into their cgroup, where they have one. Raises VmmRefused, KatapodError."""
        if self._cgroup is not None and self._cgroup.wants_vcpus:
            self._cgroup.place_vcpus(await self.guard(self.vm.vcpu_threads()))

    async def wait_resized(self) -> None:
        """Until the guest uses the memory that it was given as it began to run. Raises VmmRefused, KatapodError."""
        if self._resizing is not None:
            with span("wait for plugged memory"):
                await self.guard(answer_of(self._resizing))
            self._resizing = None

    async def close(self, *, expendable: bool = False) -> None:
        """End the VM and release all it held; its record and logs stay until recovery.remove_sandbox. Idempotent.

        With `expendable` nothing that the guest has written outlives it, so it is not asked to write it out.
        Runs to its end whatever happens to the caller; errors of single steps are collected and raised
        together as an ExceptionGroup.
        """
        if self._closed:
            return
        self._closed = True
        self.vm.expendable = expendable
        await finish(self._stack.aclose(), name="sandbox-close")

    def adopt(self, stack: contextlib.AsyncExitStack) -> None:
        """Take over the releases of what start_sandbox acquired."""
        self._stack = stack


async def start_machine(plan: SandboxPlan, store: StateStore, stack: ReleaseStack, note: StartRecord) -> Machine:
    """Make the machine's directories and start it; the guest has the sandbox then. Releases go to `stack`."""
    paths = store.layout.sandbox(plan.record.sandbox_id)
    with span("make directories"):
        for directory in (paths.share, paths.vm):
            _claim_directory(store.layout, directory, stack)
        export_directory(paths.mounts, paths.shared)
        for source in plan.bind_mounts:
            bind(source, paths.mounts / SANDBOX_MOUNTS / source.name, Access.READ_ONLY)

    if plan.cgroup is not None:
        note(cgroups=plan.record.cgroups)  # before they are made
    with doubting(plan, store.layout):
        machine = await running_machine(plan, paths, stack, note)
    watch_doubts(plan, store.layout, machine.death)
    with span("create sandbox"):
        await guarded(answer_of(machine.created), machine.death, plan.record.sandbox_id)
    return machine


async def start_sandbox(
    plan: SandboxPlan, store: StateStore, ready: StartedMachine | None = None, attaching: Attaching | None = None
) -> Sandbox:
    """Start a sandbox, in the machine `ready` if that fits; if not, the machine is ended.

    Its network namespace may be empty until `attaching` is done: the machine is started meanwhile.

    On failure, or when cancelled, all that was acquired is released again. The state directory of plan.record must
    exist (StateStore.create); it is the caller's to remove.
    """
    # a machine of the pool runs in the cgroups of its maker, and its memory would stay charged to them
    elsewhere = plan.cgroup is not None and plan.cgroup.holds_supervisor
    if ready is not None and (elsewhere or not ready.fits(plan)):
        await ready.close()
        ready = None
    if ready is not None:
        # without hot-plug the root file system comes by the share
        disk = plan.root_disk if plan.vmm.capabilities(plan.vm).hotplug else None
        record = msgspec.structs.replace(plan.record, machine_id=ready.machine_id, cgroups=ready.cgroups)
        plan = replace(plan, record=record, root_disk=disk, cgroup=None)
    stack = ReleaseStack()
    note = StartRecord(store, plan.record, attaching)
    try:
        _claim_directory(store.layout, store.layout.sandbox(plan.record.sandbox_id).layers, stack)
        if ready is not None:
            machine = await ready.take_over(plan, stack, note)
        else:
            async with turn(store.layout.starts_lock, STARTS_A_CPU * (os.cpu_count() or 1)):
                machine = await start_machine(plan, store, stack, note)
        sandbox = Sandbox(plan, store, machine)
        await stack.enter_async_context(beside(watch_health(sandbox), name="watch-health"))
        await stack.enter_async_context(beside(sandbox.clock.run(), name="keep-clock"))
        stack.push_async_callback(sandbox.console.close)
        stack.push_async_callback(_destroy_guest, sandbox)
        stack.callback(setattr, machine.vm, "stopping", True)
        stack.callback(setattr, machine.share, "stopping", True)
        if machine.network is not None:
            machine.network.note = lambda record: sandbox.save(network=record)
        sandbox.devices.note()
        sandbox.save(
            attachment=attaching.result() if attaching is not None else plan.record.attachment,
            network=machine.network.record if machine.network is not None else None,
            state=State.RUNNING,
            vmm_pid=machine.vm.pid,
            vcpus=machine.spec.vcpus,
            mem_mib=machine.mem_mib,
            template=machine.template,
        )
        with span("plug vCPUs and memory"):
            await sandbox.place_vcpus()
            await sandbox.resize(vcpus=plan.vm.vcpus, mem_mib=plan.vm.mem_mib)
    except BaseException:
        await stack.unwind(plan.record.sandbox_id)
        raise
    sandbox.adopt(stack)
    return sandbox


def _claim_directory(layout: Layout, path: Path, stack: ReleaseStack) -> None:
    stack.callback(clear_away, layout, path)
    clear_away(layout, path)  # the name is ours by now: whatever lies there is a leftover
    _make_directory(path)


def _make_directory(path: os.PathLike[str]) -> None:
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        free_mib = shutil.disk_usage(path).free >> 20
    except OSError as exc:
        kind = NoSpace if exc.errno == 28 else KatapodError
        raise kind(f"cannot make {os.fspath(path)}: {exc.strerror}", hint=hint_for(exc)) from exc
    if free_mib < SPACE_FLOOR_MIB:
        raise NoSpace(
            f"cannot start in {os.fspath(path)}: {free_mib} MiB are free, {SPACE_FLOOR_MIB} are needed",
            hint="free some space on that file system",
        )


async def _destroy_guest(sandbox: Sandbox) -> None:
    """Let the guest end its processes and write out what it holds. A dead or hanging guest is no error here."""
    if sandbox.death.done():
        return
    if trace_enabled():
        await _take_trace(sandbox)
    if sandbox.vm.expendable:
        return
    with span("destroy the sandbox in the guest"):
        try:
            await guarded(
                sandbox.agent.call("DestroySandbox", agent_pb2.DestroySandboxRequest(), timeout_s=DESTROY_LIMIT_S),
                sandbox.death,
                sandbox.sandbox_id,
            )
        except KatapodError as exc:
            log.warning("the guest did not end by itself: %s", exc)


async def _take_trace(sandbox: Sandbox) -> None:
    try:
        for name, start_ns, duration_ns in await sandbox.agent.trace(DESTROY_LIMIT_S):
            add_span(name, start_ns, start_ns + duration_ns, GUEST)
    except RpcError as exc:
        log.warning("the guest's part of the trace is missing: %s", exc)
