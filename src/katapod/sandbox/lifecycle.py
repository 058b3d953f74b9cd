"""A sandbox from its first record on disk to its last file removed.

`open_sandbox` acquires in one order, each step with its release; success hands the stack of releases to
the Sandbox, failure unwinds it. From then on watchers tell why a sandbox died: the first cause wins.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import socket
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from katapod.host.facts import claim_vsock_cid
from katapod.host.logs import read_tail
from katapod.host.mounts import export_directory, remove_tree
from katapod.host.qemu import QemuFailed, QemuLogs, QemuProcess, running_qemu
from katapod.host.qmp import QmpError, QmpLinkBroken
from katapod.host.state import StateStore
from katapod.host.tasks import finish
from katapod.host.virtiofsd import VirtiofsdProcess, running_virtiofsd
from katapod.model.errors import KatapodError, NoSpace, NotFound
from katapod.model.layout import GUEST_SANDBOX_DIR, GUEST_SHARE, SHARE_TAG, SandboxPaths
from katapod.model.record import SandboxRecord, State
from katapod.plan.hotplug import (
    BRIDGE_SLOTS,
    MEMORY_BLOCK_MIB,
    HotplugPlan,
    plan_disk,
    plan_memory,
    plan_shared_directory,
    plan_vcpus,
)
from katapod.plan.virtiofsd import VirtiofsdPlan
from katapod.plan.vmm import Accelerator, FdSlot, VmSpec, plan_qemu
from katapod.rpc.agent import AgentClient
from katapod.rpc.client import TtrpcClient
from katapod.rpc.pb import agent_pb2
from katapod.rpc.status import RpcError, StatusCode
from katapod.sandbox.errors import AgentFailed

__all__ = ["Sandbox", "SandboxPlan", "open_sandbox"]

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

AGENT_PORT = 1024  # vsock, facts agent-protocol.md section 1
HEALTH_PERIOD_S = 5.0
HEALTH_LIMIT_S = 30.0
DESTROY_LIMIT_S = 5.0
CAUSE_LIMIT_S = 2.0  # between a link that breaks and the end of a process that broke it
SPACE_FLOOR_MIB = 16  # below this, starting would only fail later and less clearly


@dataclass(frozen=True, slots=True)
class SandboxPlan:
    """All that is decided before anything is acquired."""

    record: SandboxRecord
    vm: VmSpec
    virtiofsd: VirtiofsdPlan
    use_vsock: bool
    hostname: str
    dns: tuple[str, ...]
    shm_size_bytes: int
    agent_timeout_s: float
    virtio_fs_queue_size: int = 1024
    kernel_modules: tuple[str, ...] = ()
    console_limit_bytes: int = 256 * 1024

    def describe(self) -> str:
        return "\n".join([plan_qemu(self.vm).describe(), self.virtiofsd.describe()])


class Sandbox:
    """A live sandbox, owned by this process."""

    def __init__(
        self,
        plan: SandboxPlan,
        store: StateStore,
        vm: QemuProcess,
        share: VirtiofsdProcess,
        agent: AgentClient,
        death: "asyncio.Future[KatapodError]",
    ) -> None:
        self.plan = plan
        self.store = store
        self.record = plan.record
        self.vm = vm
        self.share = share
        self.agent = agent
        self.death = death
        self.guest_mem_mib = plan.vm.boot_mem_mib
        self.guest_vcpus = plan.vm.vcpus
        self._free_slots = list(BRIDGE_SLOTS[1:])  # slot 1 is the share's
        self._disks: dict[str, tuple[int, HotplugPlan]] = {}
        self._dimms = 0
        self._stack = contextlib.AsyncExitStack()
        self._closed = False

    @property
    def sandbox_id(self) -> str:
        return self.record.sandbox_id

    @property
    def paths(self) -> SandboxPaths:
        return self.store.layout.sandbox(self.sandbox_id)

    def save(self, **changes: Any) -> None:
        """Change the record, on disk too."""
        self.record = msgspec.structs.replace(self.record, **changes)
        self.store.write(self.record)

    async def guard(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Await `work`; if the sandbox dies meanwhile raise why it died instead of what came of that.

        Raises AgentFailed for an error of the agent, KatapodError for the death.
        """
        return await guarded(work, self.death, self.sandbox_id)

    async def add_disk(self, disk_id: str, path: os.PathLike[str], *, read_only: bool) -> str:
        """Plug a disk; returns its guest PCI path. Raises QmpError, KatapodError if the bridge is full."""
        if not self._free_slots:
            raise KatapodError(f"cannot plug disk {disk_id}: all {len(BRIDGE_SLOTS)} slots of the bridge are taken")
        slot = self._free_slots.pop(0)
        try:
            plan = plan_disk(disk_id, Path(path), slot, read_only=read_only)
            await self.guard(self.vm.qmp.plug(plan))
        except QmpError:
            self._free_slots.insert(0, slot)
            raise
        self._disks[disk_id] = (slot, plan)
        return plan.guest_path

    async def remove_disk(self, disk_id: str) -> None:
        """Take a disk out, once the guest has let go of it. Raises QmpError; NotFound if it is not plugged."""
        if disk_id not in self._disks:
            raise NotFound(f"cannot unplug disk {disk_id}: it is not plugged")
        slot, plan = self._disks[disk_id]
        await self.guard(self.vm.qmp.unplug(plan))
        del self._disks[disk_id]
        self._free_slots.insert(0, slot)

    async def grow(self, *, vcpus: int, mem_mib: int) -> None:
        """Plug vCPUs and memory until the guest has at least these; what it has more stays.

        Memory comes in blocks of MEMORY_BLOCK_MIB. Raises QmpError, AgentFailed, KatapodError.
        """
        more_cpus = vcpus - self.guest_vcpus
        more_mib = -(-(mem_mib - self.guest_mem_mib) // MEMORY_BLOCK_MIB) * MEMORY_BLOCK_MIB
        if more_cpus > 0:
            free = await self.guard(self.vm.qmp.execute("query-hotpluggable-cpus"))
            try:
                plan = plan_vcpus(free, more_cpus)
            except ValueError as exc:
                raise KatapodError(str(exc), hint="raise default_maxvcpus in configuration.toml") from exc
            await self.guard(self.vm.qmp.plug(plan))
            self.guest_vcpus = vcpus
        if more_mib > 0:
            await self.guard(self.vm.qmp.plug(plan_memory(self._dimms, more_mib)))
            self._dimms += 1
            self.guest_mem_mib += more_mib
        if more_cpus > 0 or more_mib > 0:
            request = agent_pb2.OnlineCPUMemRequest(wait=True, nb_cpus=max(0, more_cpus), cpu_only=more_mib <= 0)
            await self.guard(self.agent.call("OnlineCPUMem", request))
            self.save(vcpus=self.guest_vcpus, mem_mib=self.guest_mem_mib)

    async def close(self) -> None:
        """End the VM and release all it held; its record and logs stay until recovery.remove_sandbox. Idempotent.

        Runs to its end whatever happens to the caller; errors of single steps are collected and raised
        together as an ExceptionGroup.
        """
        if self._closed:
            return
        self._closed = True
        await finish(self._stack.aclose(), name="sandbox-close")

    def adopt(self, stack: contextlib.AsyncExitStack) -> None:
        """Take over the releases of what open_sandbox acquired."""
        self._stack = stack


async def guarded(
    work: Coroutine[Any, Any, _Result], death: "asyncio.Future[KatapodError]", sandbox_id: str
) -> _Result:
    task = asyncio.get_running_loop().create_task(work)
    waiting: set[asyncio.Future[Any]] = {task, death}
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise death.result()
        return task.result()
    except (QmpError, QmpLinkBroken) as exc:
        # what QEMU says of a virtiofsd that has died, or a closed monitor, is a consequence: the cause is on its way
        await asyncio.wait({death}, timeout=CAUSE_LIMIT_S)
        if death.done():
            raise death.result() from exc
        raise
    except RpcError as exc:
        if exc.code is StatusCode.UNAVAILABLE:
            # the channel breaks a moment before the kernel tells us that QEMU has ended
            await asyncio.wait({death}, timeout=CAUSE_LIMIT_S)
            if death.done():
                raise death.result() from exc
        raise AgentFailed(f"the agent of sandbox {sandbox_id} failed: {exc.message}", code=exc.code) from exc
    finally:
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def open_sandbox(plan: SandboxPlan, store: StateStore) -> Sandbox:
    """Start a sandbox. On failure, or when cancelled, all that was acquired is released again.

    The state directory of plan.record must exist (StateStore.create); it is the caller's to remove.
    """
    paths = store.layout.sandbox(plan.record.sandbox_id)
    death: asyncio.Future[KatapodError] = asyncio.get_running_loop().create_future()
    stack = _CollectingStack()
    try:
        for directory in (paths.share, paths.vm, paths.layers):
            stack.callback(remove_tree, directory)
            remove_tree(directory)  # the name is ours by now: whatever lies there is left of another life
            _make_directory(directory)
        export_directory(paths.mounts, paths.shared)

        share = await stack.enter_async_context(
            running_virtiofsd(plan.virtiofsd, paths.vm / "vhost-fs.sock", paths.state / "virtiofsd.log")
        )
        vm_spec, vsock_fd = _claim_channel(plan, stack)
        logs = QemuLogs(paths.console_log, paths.vmm_log, plan.console_limit_bytes)
        vm = await stack.enter_async_context(_running_vm(vm_spec, logs, vsock_fd))
        watch = asyncio.create_task(_watch_processes(vm, share, death), name="watch-processes")
        stack.callback(watch.cancel)
        store.write(msgspec.structs.replace(plan.record, vmm_pid=vm.pid))

        shared = plan_shared_directory(
            SHARE_TAG, paths.vm / "vhost-fs.sock", BRIDGE_SLOTS[0], queue_size=plan.virtio_fs_queue_size
        )
        await guarded(vm.qmp.plug(shared), death, plan.record.sandbox_id)
        await guarded(vm.resume(), death, plan.record.sandbox_id)

        agent = await _connect_agent(plan, vm_spec, vm, death, stack)
        await guarded(agent.call("CreateSandbox", _create_request(plan)), death, plan.record.sandbox_id)
        sandbox = Sandbox(plan, store, vm, share, agent, death)
        health = asyncio.create_task(_watch_health(sandbox), name="watch-health")
        stack.callback(health.cancel)
        stack.push_async_callback(_destroy_guest, sandbox)
        stack.callback(setattr, vm, "stopping", True)
        stack.callback(setattr, share, "stopping", True)
        sandbox.save(state=State.RUNNING, vmm_pid=vm.pid, vcpus=plan.vm.vcpus, mem_mib=plan.vm.boot_mem_mib)
    except BaseException:
        try:
            await finish(stack.aclose(), name="sandbox-unwind")
        except ExceptionGroup as left:
            for error in left.exceptions:  # beside the first cause, which is what the caller gets
                log.error("sandbox %s: %s", plan.record.sandbox_id, error)
        raise
    sandbox.adopt(stack)
    return sandbox


@contextlib.asynccontextmanager
async def _running_vm(spec: VmSpec, logs: QemuLogs, vsock_fd: int | None) -> AsyncIterator[QemuProcess]:
    """running_qemu, whose failures name the guest's files: QEMU's own words often do not."""
    async with contextlib.AsyncExitStack() as stack:
        try:
            vm = await stack.enter_async_context(running_qemu(plan_qemu(spec), logs, vsock_fd=vsock_fd))
        except QemuFailed as exc:
            raise QemuFailed(f"{exc}\n{_guest_of(spec)}", hint=exc.hint or _hint_for(spec), **exc.context) from exc
        yield vm


def _guest_of(spec: VmSpec) -> str:
    return f"the guest: kernel {spec.kernel}, initrd {spec.initrd}, under {spec.accelerator.value}"


def _hint_for(spec: VmSpec) -> str:
    if spec.accelerator is Accelerator.KVM:
        return "to find out whether it is KVM's fault, emulate: --accel tcg"
    return "kata-runtime image build makes kernel and initrd"


class _CollectingStack(contextlib.AsyncExitStack):
    """Runs every release even if one fails, and raises all their errors, not only the last."""

    def __init__(self) -> None:
        super().__init__()
        self._errors: list[Exception] = []

    def callback(self, callback: Any, /, *args: Any, **kwargs: Any) -> Any:
        def collect() -> None:
            try:
                callback(*args, **kwargs)
            except Exception as exc:
                self._errors.append(exc)

        return super().callback(collect)

    async def aclose(self) -> None:
        try:
            await super().aclose()
        except Exception as exc:
            self._errors.append(exc)
        if self._errors:
            errors, self._errors = self._errors, []
            raise ExceptionGroup("not all of the sandbox could be released", errors)


def _make_directory(path: os.PathLike[str]) -> None:
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        free_mib = shutil.disk_usage(path).free >> 20
    except OSError as exc:
        kind = NoSpace if exc.errno == 28 else KatapodError
        raise kind(f"cannot make {os.fspath(path)}: {exc.strerror}") from exc
    if free_mib < SPACE_FLOOR_MIB:
        raise NoSpace(
            f"cannot start in {os.fspath(path)}: {free_mib} MiB are free, {SPACE_FLOOR_MIB} are needed",
            hint="free some space on that file system",
        )


def _claim_channel(plan: SandboxPlan, stack: contextlib.AsyncExitStack) -> tuple[VmSpec, int | None]:
    if not plan.use_vsock:
        return plan.vm, None
    cid, fd = claim_vsock_cid()
    stack.callback(os.close, fd)
    return replace(plan.vm, vsock_cid=cid), fd


async def _connect_agent(
    plan: SandboxPlan,
    vm_spec: VmSpec,
    vm: QemuProcess,
    death: "asyncio.Future[KatapodError]",
    stack: contextlib.AsyncExitStack,
) -> AgentClient:
    """Return a client once the agent has answered. With a serial port nothing is polled: QEMU keeps our
    first request until the guest opens the port."""
    sandbox_id = plan.record.sandbox_id
    peer = f"agent of sandbox {sandbox_id}"
    started = time.monotonic()
    sock = vm.take_socket(FdSlot.AGENT)
    try:
        async with asyncio.timeout(plan.agent_timeout_s):
            if sock is None:
                assert vm_spec.vsock_cid is not None
                sock = await guarded(_dial_vsock(vm_spec.vsock_cid), death, sandbox_id)
            client = await TtrpcClient.on_socket(sock, peer)
            stack.callback(client.close)
            agent = AgentClient(client)
            await guarded(agent.check(timeout_s=None), death, sandbox_id)
    except TimeoutError as exc:
        console = read_tail(vm.logs.console)
        raise AgentFailed(
            f"cannot start sandbox {sandbox_id}: the guest does not boot: its agent did not answer within "
            f"{plan.agent_timeout_s:g} s (dial_timeout)\n{_guest_of(vm_spec)}"
            + (f"\nlast lines of the guest's console:\n{console}" if console else "; its console is silent"),
            hint=_hint_for(vm_spec),
        ) from exc
    except QemuFailed as exc:
        if vm.child.process.returncode != 0:
            raise
        # QEMU ended well: the guest's kernel panicked, or its init ended
        raise AgentFailed(
            f"cannot start sandbox {sandbox_id}: the guest does not boot: it stopped before its agent answered\n"
            f"{_guest_of(vm_spec)}\nlast lines of the guest's console:\n{read_tail(vm.logs.console)}",
            hint=_hint_for(vm_spec),
        ) from exc
    log.info("the agent answered after %.2f s", time.monotonic() - started)
    return agent


async def _dial_vsock(cid: int) -> socket.socket:
    """Connect to the agent's port; refused until the agent listens."""
    while True:
        sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            await asyncio.get_running_loop().sock_connect(sock, (cid, AGENT_PORT))
            return sock
        except OSError:
            sock.close()
            await asyncio.sleep(0.02)
        except BaseException:
            sock.close()
            raise


def _create_request(plan: SandboxPlan) -> agent_pb2.CreateSandboxRequest:
    modules = [line.split() for line in plan.kernel_modules]
    return agent_pb2.CreateSandboxRequest(
        sandbox_id=plan.record.sandbox_id,
        hostname=plan.hostname[:64],
        dns=plan.dns,
        storages=[
            agent_pb2.Storage(driver="virtio-fs", source=SHARE_TAG, fstype="virtiofs", mount_point=GUEST_SHARE),
            agent_pb2.Storage(
                driver="ephemeral",
                source="shm",
                fstype="tmpfs",
                mount_point=f"{GUEST_SANDBOX_DIR}/shm",
                options=["noexec", "nosuid", "nodev", "mode=1777", f"size={plan.shm_size_bytes}"],
            ),
        ],
        kernel_modules=[agent_pb2.KernelModule(name=name, parameters=rest) for name, *rest in modules],
    )


async def _watch_processes(vm: QemuProcess, share: VirtiofsdProcess, death: "asyncio.Future[KatapodError]") -> None:
    """Name the process that died first. virtiofsd ends when QEMU does, so QEMU gets a moment to be seen."""
    vm_end = asyncio.create_task(vm.wait_end(), name="wait-qemu")
    share_end = asyncio.create_task(share.wait_end(), name="wait-virtiofsd")
    try:
        await asyncio.wait({vm_end, share_end}, return_when=asyncio.FIRST_COMPLETED)
        if not vm_end.done():
            await asyncio.wait({vm_end}, timeout=0.3)
        if death.done():
            return
        if vm_end.done() and not vm.stopping:
            await asyncio.sleep(0.05)  # the last words of the console are still on their way to the log
            if not death.done():
                death.set_result(vm.explain_end())
        elif not vm_end.done() and not share.stopping:
            death.set_result(share.explain_end())
    finally:
        vm_end.cancel()
        share_end.cancel()


async def _watch_health(sandbox: Sandbox) -> None:
    """Ask the agent now and then whether it serves; declare the sandbox dead when it does not answer."""
    while True:
        await asyncio.sleep(HEALTH_PERIOD_S)
        try:
            await sandbox.agent.check(timeout_s=HEALTH_LIMIT_S)
        except RpcError as exc:
            if exc.code is StatusCode.DEADLINE_EXCEEDED and not sandbox.death.done():
                sandbox.death.set_result(
                    AgentFailed(
                        f"sandbox {sandbox.sandbox_id} hangs: its agent did not answer for {HEALTH_LIMIT_S:g} s"
                    )
                )
            return


async def _destroy_guest(sandbox: Sandbox) -> None:
    """Let the guest end its processes and write out what it holds. A dead or hanging guest is no error here."""
    if sandbox.death.done():
        return
    try:
        await guarded(
            sandbox.agent.call("DestroySandbox", agent_pb2.DestroySandboxRequest(), timeout_s=DESTROY_LIMIT_S),
            sandbox.death,
            sandbox.sandbox_id,
        )
    except KatapodError as exc:
        log.warning("the guest did not end by itself: %s", exc)
