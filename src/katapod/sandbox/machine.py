"""The machine of a sandbox: virtiofsd, a VMM and an agent that answers, by a clone of a template or a cold boot.

Both are one path: a VM that has not run yet, devices plugged into it, its first instruction, the agent's first
answer. They differ in where memory and device state come from.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from katapod.host.cgroup import HostCgroup, joined_cgroup
from katapod.host.guest_memory import copy_memory, new_memory
from katapod.host.logs import read_tail
from katapod.host.patience import patient_timeout
from katapod.host.trace import span
from katapod.model.devices import DimmEntry, MemoryEntry
from katapod.model.errors import KatapodError, NoSpace
from katapod.model.layout import GUEST_SANDBOX_DIR, SHARE_TAG, SandboxPaths
from katapod.rpc.agent import AgentClient
from katapod.rpc.pb import agent_pb2
from katapod.sandbox.agent_link import claim_channel, claim_user, connect_agent
from katapod.sandbox.devices import Devices
from katapod.sandbox.errors import AgentFailed, GuestHangs
from katapod.sandbox.failures import guest_of, hint_for, refuse_second_try
from katapod.sandbox.guard import guarded
from katapod.sandbox.network import PodNetwork, attach_network
from katapod.sandbox.planning import SandboxPlan
from katapod.sandbox.plugged_memory import until_plugged
from katapod.sandbox.release import ReleaseStack
from katapod.sandbox.share import Share, share_storage
from katapod.sandbox.start_record import StartRecord
from katapod.sandbox.template_build import open_template
from katapod.sandbox.template_store import Template, TemplateBroken, discard_template
from katapod.tasks import beside, finish, together
from katapod.vmm.devices import blocks_of
from katapod.vmm.errors import VmmFailed, VmmLinkBroken, VmmRefused
from katapod.vmm.protocol import Handed, VirtualMachine, VmmLogs
from katapod.vmm.spec import VmSpec
from katapod.vmm.template import clone_of

__all__ = [
    "Machine",
    "answer_of",
    "attach_pod_network",
    "begin_call",
    "enter_rest",
    "plug_rest",
    "reseed",
    "running_machine",
    "set_clock",
    "shm_storage",
]

log = logging.getLogger(__name__)

SEED_BYTES = 512  # of host entropy for a clone, as upstream; more than the kernel's pool holds
CLOCK_TRIES, CLOCK_GOOD_S = 2, 0.05
VMM_END_S = 1.0  # between the VMM's goodbye to virtiofsd, which ends at once then, and its own end
VMM_SEEN_S = 0.3  # until the end of a VMM is seen that has made virtiofsd fail
KILLED = (-9, -15)  # how a VMM ends that was asked to: SIGTERM, SIGKILL


class Machine(Struct, frozen=True):
    """A running guest. `death` is set when one of its processes ends unasked; `spec` is what it was started with."""

    spec: VmSpec
    vm: VirtualMachine
    share: Share
    agent: AgentClient
    death: "asyncio.Future[KatapodError]"
    created: "asyncio.Task[Any]"  # CreateSandbox, under way
    mem_mib: int  # of the guest, with what was plugged
    devices: Devices
    template: str  # the key of what it was cloned from; empty after a cold boot
    network: PodNetwork | None = None
    resizing: "asyncio.Task[Any] | None" = None  # until the guest uses what was plugged; None: it does
    cgroup: HostCgroup | None = None  # that its processes are in; None: their supervisor's


class _Processes(Struct, frozen=True):
    vm: VirtualMachine
    share: Share
    death: "asyncio.Future[KatapodError]"


class _CloneFailed(Exception):
    """A template did not become a machine; the cause is its own `__cause__`."""


async def running_machine(plan: SandboxPlan, paths: SandboxPaths, stack: ReleaseStack, note: StartRecord) -> Machine:
    """Start the machine; its releases go to `stack`. `note` writes the record: of the VMM and
    its devices before the guest has them, of a network before it is made.

    Where a template is wanted but cannot be had or does not work, the guest boots, with one warning. On failure
    nothing is left on the stack. Raises KatapodError.
    """
    if plan.template is not None:
        try:
            async with open_template(plan.template) as template:
                try:
                    return await _start(plan, paths, stack, note, template)
                except _CloneFailed as exc:
                    discard_template(template)
                    refuse_second_try(plan, exc.__cause__)
                    log.warning(
                        "the template %s does not work and is removed; this sandbox boots instead: %s",
                        template.key,
                        str(exc.__cause__).partition("\n")[0],
                    )
        except (TemplateBroken, NoSpace) as exc:
            refuse_second_try(plan, exc)
            log.warning("this sandbox boots without a template: %s", str(exc).partition("\n")[0])
    return await _start(plan, paths, stack, note, None)


async def _start(
    plan: SandboxPlan,
    paths: SandboxPaths,
    stack: ReleaseStack,
    note: StartRecord,
    template: Template | None,
) -> Machine:
    """One attempt. Raises _CloneFailed where a cold boot may do better, else KatapodError."""
    own = ReleaseStack()
    try:
        # not before: a template that is built meanwhile is not the sandbox's memory
        cgroup = await own.enter_async_context(joined_cgroup(plan.cgroup))
        if cgroup is not None:
            plan = replace(plan, vm=replace(plan.vm, cgroups=cgroup.of_vmm))
        plan = _with_user(plan, own)
        if template is None:
            machine = await _boot(plan, paths, own, note)
        else:
            machine = await _clone(plan, paths, own, note, template)
    except BaseException:
        await own.unwind(plan.record.sandbox_id)
        raise
    stack.push_async_callback(own.aclose)
    return replace(machine, cgroup=cgroup)


def _with_user(plan: SandboxPlan, own: ReleaseStack) -> SandboxPlan:
    """With a user that VMM and taps have to themselves, where the VMM runs as one. Raises HostLacks."""
    capabilities = plan.vmm.capabilities(plan.vm)
    vm = claim_user(plan.vm, capabilities, own)
    owner = vm.uid if capabilities.taps_by_name else None
    return replace(plan, vm=vm, network=replace(plan.network, tap_owner=owner))


async def _boot(plan: SandboxPlan, paths: SandboxPaths, own: ReleaseStack, note: StartRecord) -> Machine:
    given: dict[Handed, int] = {}
    spec = claim_channel(plan.vm, given, own)
    networks = await own.enter_async_context(ReleaseStack())  # released once the VMM has ended
    processes, network = await together(
        _launch(plan, paths, own, spec, given), attach_pod_network(plan, note, networks)
    )
    devices = _enter_devices(plan, processes, network, spec.mem_mib, 0)
    note(vmm_pid=processes.vm.pid, devices=devices.next_record())
    await _plug_and_run(plan, processes, network, devices)
    with span("boot until the agent answers"):
        agent, created = await _meet_agent(plan, spec, processes, network, own, cloned=False)
    return Machine(
        spec,
        processes.vm,
        processes.share,
        agent,
        processes.death,
        created,
        mem_mib=spec.mem_mib,
        devices=devices,
        template="",
        network=network,
    )


async def _clone(
    plan: SandboxPlan, paths: SandboxPaths, own: ReleaseStack, note: StartRecord, template: Template
) -> Machine:
    assert plan.template is not None
    memory = new_memory(template.memory_mib)
    own.callback(os.close, memory)  # VMM and virtiofsd have it as long as they need it
    given = {Handed.MEMORY: memory, Handed.STATE: template.state_fd}
    spec = claim_channel(clone_of(plan.template, plan.vm), given, own)
    networks = await own.enter_async_context(ReleaseStack())  # released once the VMM has ended
    try:
        (processes, _), network = await together(
            together(_launch(plan, paths, own, spec, given), _copy(template.memory_fd, memory)),
            attach_pod_network(plan, note, networks),
        )
        more_mib = blocks_of(plan.vm.mem_mib - spec.mem_mib)
        devices = _enter_devices(plan, processes, network, spec.mem_mib, more_mib)
        note(vmm_pid=processes.vm.pid, devices=devices.next_record())
        with span("load device state"):
            await guarded(processes.vm.load_state(template.state_fd), processes.death, plan.record.sandbox_id)
        plugged = await _plug_and_run(plan, processes, network, devices)
        with span("wake the clone"):
            agent, created = await _meet_agent(plan, spec, processes, network, own, cloned=True)
        with span("wait for plugged memory"):
            await guarded(until_plugged(plugged, more_mib), processes.death, plan.record.sandbox_id)
    except (VmmRefused, VmmLinkBroken, VmmFailed, AgentFailed) as exc:
        if isinstance(exc, VmmFailed) and exc.returncode in KILLED:
            raise  # no fault of the template
        raise _CloneFailed from exc
    return Machine(
        spec,
        processes.vm,
        processes.share,
        agent,
        processes.death,
        created,
        mem_mib=spec.mem_mib + more_mib,
        devices=devices,
        template=template.key,
        network=network,
    )


async def attach_pod_network(plan: SandboxPlan, note: StartRecord, stack: ReleaseStack) -> PodNetwork | None:
    await note.wait_attached()
    return await attach_network(
        plan.netns, plan.network, vcpus=plan.vm.vcpus, note=lambda record: note(network=record), stack=stack
    )


async def _copy(source: int, target: int) -> None:
    """In a thread, and to its end even if we are cancelled: the descriptors are the caller's, and closed next."""

    def work() -> None:
        with span("copy memory", "memory"):
            copy_memory(source, target)

    await finish(asyncio.to_thread(work), name="copy-memory")


async def _launch(
    plan: SandboxPlan, paths: SandboxPaths, own: ReleaseStack, spec: VmSpec, given: Mapping[Handed, int]
) -> _Processes:
    """Start virtiofsd, if something is shared, and the VMM side by side, and watch them. Raises VmmFailed,
    VirtiofsdFailed, MissingProgram."""
    # apart from each other, so that the VMM is ended first whichever was up first: virtiofsd ends with it
    share_stack = await own.enter_async_context(contextlib.AsyncExitStack())
    vm_stack = await own.enter_async_context(contextlib.AsyncExitStack())

    share = Share(plan.virtiofsd, paths, share_stack)
    share.mounted = plan.shares

    async def start_share() -> None:
        if plan.shares:
            await share.start()

    async def start_vm() -> VirtualMachine:
        logs = VmmLogs(paths.console_log, paths.vmm_log, plan.console_limit_bytes)
        with span(f"start {plan.vmm.name}", plan.vmm.name):
            return await vm_stack.enter_async_context(_named_vmm(plan, spec, logs, given))

    _, vm = await together(start_share(), start_vm())
    death: asyncio.Future[KatapodError] = asyncio.get_running_loop().create_future()
    await own.enter_async_context(beside(_watch_processes(vm, share, death), name="watch-processes"))
    return _Processes(vm, share, death)


def _enter_devices(
    plan: SandboxPlan, processes: _Processes, network: PodNetwork | None, mem_mib: int, more_mib: int
) -> Devices:
    """All that the machine gets, whose VMM has `mem_mib` of memory, entered and not attached yet. Raises KatapodError
    if it has no room."""
    vm = plan.vm
    memory = MemoryEntry(mem_mib, vm.max_mem_mib, hugepages=vm.hugepages, preallocated=vm.preallocated)
    devices = Devices(processes.vm, memory, plan.vmm.capabilities(vm), plan.disks)
    if plan.shares:
        devices.enter_share(SHARE_TAG, processes.share.socket)
    enter_rest(plan, network, devices)
    devices.enter_memory(mem_mib, more_mib)
    return devices


def enter_rest(plan: SandboxPlan, network: PodNetwork | None, devices: Devices) -> None:
    """The root disk and NICs: what differs between sandboxes."""
    disk = plan.root_disk
    if disk is not None:
        devices.enter_disk(disk.disk_id, disk.overlay, base=disk.base, kept=disk.kept)
    if network is not None:
        network.enter(devices)


async def _plug_and_run(
    plan: SandboxPlan, processes: _Processes, network: PodNetwork | None, devices: Devices
) -> "asyncio.Future[str]":
    """Plug the shared directory, the root disk and memory while the guest stands still; then let it run.

    Returns what will be the guest's word that the memory is in use.
    """
    vm, death, sandbox_id = processes.vm, processes.death, plan.record.sandbox_id
    dimms = devices.table.dimms
    with span("plug devices"):
        if plan.shares:
            await guarded(devices.attach_share(plan.virtio_fs_queue_size), death, sandbox_id)
        plugged = vm.expect_memory(len(dimms) - 1)
        await guarded(plug_rest(plan, network, devices, dimms), death, sandbox_id)
        await guarded(vm.run(), death, sandbox_id)
    return plugged


async def plug_rest(
    plan: SandboxPlan, network: PodNetwork | None, devices: Devices, dimms: tuple[DimmEntry, ...]
) -> None:
    """Plug the root disk, NICs and memory: what differs between sandboxes."""
    if plan.root_disk is not None:
        await devices.attach_disk(plan.root_disk.disk_id)
    if network is not None:
        await network.plug(devices)
    await devices.attach_memory(dimms)


@contextlib.asynccontextmanager
async def _named_vmm(
    plan: SandboxPlan, spec: VmSpec, logs: VmmLogs, given: Mapping[Handed, int]
) -> AsyncIterator[VirtualMachine]:
    """A VM whose failures name the guest's files: the VMM's own words often do not."""
    async with contextlib.AsyncExitStack() as stack:
        try:
            vm = await stack.enter_async_context(plan.vmm.start(spec, logs, given=given, netns=plan.netns))
        except VmmFailed as exc:
            raise VmmFailed(
                f"{exc}\n{guest_of(spec)}", hint=exc.hint or hint_for(spec), returncode=exc.returncode, **exc.context
            ) from exc
        yield vm


async def _meet_agent(
    plan: SandboxPlan,
    spec: VmSpec,
    processes: _Processes,
    network: PodNetwork | None,
    own: ReleaseStack,
    *,
    cloned: bool,
) -> "tuple[AgentClient, asyncio.Task[Any]]":
    """Return a client once the agent has answered, and the call that creates the sandbox, which is under way."""
    sandbox_id, vm, death = plan.record.sandbox_id, processes.vm, processes.death
    request = _create_request(plan)
    started = time.monotonic()

    async def connect() -> AgentClient:
        agent = await connect_agent(vm, spec, f"agent of sandbox {sandbox_id}")
        own.callback(agent.connection.close)  # not behind the guard: a cancellation there would lose the connection
        return agent

    try:
        async with patient_timeout(plan.agent_timeout_s, vm) as patience:
            agent = await guarded(connect(), death, sandbox_id)
            first = reseed(agent) if cloned else agent.check(timeout_s=None)
            await guarded(first, death, sandbox_id)
            # sent at once and answered in this order; not with the first call, or the clock would be late by its time
            clock = await begin_call(set_clock(agent), own, name="set-clock")
            created = await begin_call(_create_sandbox(agent, request, network), own, name="create-sandbox")
            await guarded(answer_of(clock), death, sandbox_id)
    except TimeoutError as exc:
        console = read_tail(vm.logs.console)
        raise GuestHangs(
            f"cannot start sandbox {sandbox_id}: the guest does not {'wake' if cloned else 'boot'}: its agent did not "
            f"answer within {plan.agent_timeout_s:g} s (dial_timeout){patience.left_out()}\n{guest_of(spec)}"
            + (f"\nlast lines of the guest's console:\n{console}" if console else "; its console is silent"),
            hint=hint_for(spec),
        ) from exc
    except VmmFailed as exc:
        if exc.returncode != 0:
            raise
        # the VMM ended well: the guest's kernel panicked, or its init ended
        raise AgentFailed(
            f"cannot start sandbox {sandbox_id}: the guest does not boot: it stopped before its agent answered\n"
            f"{guest_of(spec)}\nlast lines of the guest's console:\n{read_tail(vm.logs.console)}",
            hint=hint_for(spec),
        ) from exc
    log.info("the agent answered after %.2f s", time.monotonic() - started)
    return agent, created


async def _create_sandbox(
    agent: AgentClient, request: agent_pb2.CreateSandboxRequest, network: PodNetwork | None
) -> None:
    """Side by side: the guest's network is up before any container is created."""
    if network is None:
        await agent.call("CreateSandbox", request)
    else:
        await together(agent.call("CreateSandbox", request), network.tell_guest(agent))


async def begin_call(call: Coroutine[Any, Any, Any], own: ReleaseStack, *, name: str) -> "asyncio.Task[Any]":
    """Begin a call whose answer is waited for later, or never if another fails first."""
    return await own.enter_async_context(beside(call, name=name, may_fail=True))


async def answer_of(call: "asyncio.Task[Any]") -> Any:
    """A coroutine to guard: what the call under way is answered."""
    return await call


async def reseed(agent: AgentClient) -> None:
    """Make a clone a machine of its own: its template's random numbers must never be seen again."""
    await agent.call("ReseedRandomDev", agent_pb2.ReseedRandomDevRequest(data=os.urandom(SEED_BYTES)))


async def set_clock(agent: AgentClient) -> None:
    """A clone's clock stands where its template's did; that of a booted guest knows whole seconds only. A busy guest
    sets it late, by what the call took; then once more, and ClockKeeper has the last word."""
    for _ in range(CLOCK_TRIES):
        began = time.monotonic()
        now_us = time.time_ns() // 1000
        request = agent_pb2.SetGuestDateTimeRequest(Sec=now_us // 1_000_000, Usec=now_us % 1_000_000)
        await agent.call("SetGuestDateTime", request)
        if time.monotonic() - began < CLOCK_GOOD_S:
            return


def _create_request(plan: SandboxPlan) -> agent_pb2.CreateSandboxRequest:
    modules = [line.split() for line in plan.kernel_modules]
    return agent_pb2.CreateSandboxRequest(
        sandbox_id=plan.record.sandbox_id,
        hostname=plan.hostname[:64],
        dns=plan.dns,
        storages=[*([share_storage()] if plan.shares else []), shm_storage(plan)],
        guest_hook_path=plan.guest_hook_path,
        kernel_modules=[agent_pb2.KernelModule(name=name, parameters=rest) for name, *rest in modules],
    )


def shm_storage(plan: SandboxPlan) -> agent_pb2.Storage:
    return agent_pb2.Storage(
        driver="ephemeral",
        source="shm",
        fstype="tmpfs",
        mount_point=f"{GUEST_SANDBOX_DIR}/shm",
        options=["noexec", "nosuid", "nodev", "mode=1777", f"size={plan.shm_size_bytes}"],
    )


async def _watch_processes(vm: VirtualMachine, share: Share, death: "asyncio.Future[KatapodError]") -> None:
    """Name the process that died first. virtiofsd ends by itself when the VMM does, which gets a moment to be seen."""
    watching_share = beside(share.wait_end(), name="wait-virtiofsd")
    async with beside(vm.wait_end(), name="wait-vmm") as vm_end, watching_share as share_end:
        await asyncio.wait({vm_end, share_end}, return_when=asyncio.FIRST_COMPLETED)
        if not vm_end.done():
            # 0: the VMM has closed the connection
            await asyncio.wait({vm_end}, timeout=VMM_SEEN_S if share.returncode else VMM_END_S)
        if death.done():
            return
        if vm_end.done() and not vm.stopping:
            await asyncio.sleep(0.05)  # the console's last lines are still on their way to the log
            if not death.done():
                death.set_result(vm.explain_end())
        elif not vm_end.done() and not share.stopping:
            death.set_result(share.explain_end())
