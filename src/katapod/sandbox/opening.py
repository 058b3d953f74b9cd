"""The one way to a sandbox, whoever asks: sized, claimed, on record, planned, started, and reachable.

Each step has its release beside it. Until all are done nothing of them outlives a failure; then they are the Pod's.
"""

import contextlib
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

from msgspec import structs

from katapod.host.facts import HostFacts, collect_host_facts, virtiofsd_implementation
from katapod.host.named_netns import make_netns, netns_path
from katapod.host.state import StateStore
from katapod.host.trace import span
from katapod.model.config import Config
from katapod.model.errors import KatapodError
from katapod.model.record import SandboxRecord, State
from katapod.model.sizing import ContainerLimits, VmSize
from katapod.plan.virtiofsd import VirtiofsdImplementation
from katapod.sandbox.attachment import attached, prepare_attachment
from katapod.sandbox.control import control_socket
from katapod.sandbox.lifecycle import Sandbox, start_sandbox
from katapod.sandbox.loopback import listening_on_loopback, serving_loopback
from katapod.sandbox.planning import RootDisk, capabilities_of, cgroup_for, plan_sandbox, size_for
from katapod.sandbox.pod import Pod, needs_of, size_of
from katapod.sandbox.pool import ReadyMachine
from katapod.sandbox.proof import accelerator_for
from katapod.sandbox.recovery import put_back, reap_dead, remove_sandbox, why_not
from katapod.sandbox.request import SandboxRequest
from katapod.sandbox.start_record import new_record
from katapod.tasks import beside, finish
from katapod.vmm.spec import Accelerator

__all__ = ["SandboxServer", "claimed", "open_sandbox"]

log = logging.getLogger(__name__)

SandboxServer = Callable[[Sandbox], contextlib.AbstractAsyncContextManager[None]]
"""Serves an open sandbox to others, on a socket of its own, while the block runs."""


async def _no_disk() -> None:
    return None


# long: the steps of a start and their releases, in the one order in which they work
async def open_sandbox(
    request: SandboxRequest,
    config: Config,
    store: StateStore,
    *,
    ready: ReadyMachine | None = None,
    root_disk: Callable[[], Awaitable[RootDisk | None]] = _no_disk,
    servers: Sequence[SandboxServer] = (),
    tell: Callable[[str], None] = log.warning,
    shut_down: Callable[[], None] | None = None,
) -> Pod:
    """Start a sandbox, in the machine `ready` if that fits. On failure, or when cancelled, nothing of it is left.

    `root_disk` finds that of the first container once the name is taken; plugins attach the network meanwhile.
    `servers` are opened beside its own control socket. `tell` hears what a proof of the accelerator has found.
    `shut_down` is called when another command asks for the sandbox's end; None: that is refused.

    Raises AlreadyExists, UsageError, HostLacks, and as start_sandbox.
    """
    facts = collect_host_facts()
    size = size_of(request, config, facts, (request.limits,) if request.limits is not None else ())
    for told in size.clamped:
        log.warning("%s: %s", request.sandbox_id, told)
    with span("look for dead supervisors"):
        await reap_dead(store)
    async with contextlib.AsyncExitStack() as stack:
        network = None
        if request.network is not None:
            ports = stack.enter_context(contextlib.ExitStack())
            network = await prepare_attachment(request.network, config.katapod, request.sandbox_id, ports)
        record = new_record(
            request.sandbox_id,
            facts,
            auto_remove=request.auto_remove,
            pod=request.is_pod,
            labels=request.labels,
            attachment=network,
            restart=request.restart,
            again=request.again,
        )
        await stack.enter_async_context(claimed(store, record, request.again))
        attaching = None
        if network is not None:
            held = ready.netns if ready is not None else None
            attaching = await stack.enter_async_context(attached(network, request.sandbox_id, held))
        netns = Path(network.netns) if network is not None else await _netns_of(request)
        level = logging.INFO if request.fixed else logging.WARNING  # only engines forward ports so
        listener = await stack.enter_async_context(listening_on_loopback(netns, level))
        implementation = await stack.enter_async_context(
            beside(_implementation(request, config), name="implementation")
        )
        disk = await root_disk()
        choice = await accelerator_for(
            config, facts, store.layout, request.sandbox_id, request.accelerator, needs_of(request, config, size, store)
        )
        if choice.fresh:
            tell(choice.describe())
        size = _at_once(request, config, facts, size, choice.accelerator)
        cgroup = cgroup_for(request.sandbox_id, request.cgroups_path, config, size, choice.accelerator)
        plan = plan_sandbox(
            structs.replace(record, cgroups=cgroup.directories if cgroup is not None else ()),
            config,
            facts,
            store.layout,
            accelerator=choice.accelerator,
            remedy=choice.remedy,
            proof_key=choice.key,
            implementation=await implementation,
            size=size,
            hostname=request.hostname,
            dns=request.dns,
            shm_size_bytes=request.shm_size_bytes,
            netns=netns,
            cgroup=cgroup,
            root_disk=disk,
            shares=request.shares or (request.fixed and disk is None),
        )
        sandbox = await start_sandbox(plan, store, ready, attaching)
        pod = Pod(sandbox, request, config, facts)
        await stack.enter_async_context(sandbox.afterwards)
        stack.push_async_callback(pod.release)
        pod.warned = bool(size.clamped)
        await stack.enter_async_context(
            control_socket(
                sandbox.paths,
                lambda: list(pod.containers.values()),
                shut_down or pod.refuse_shutdown,
                sandbox.afterwards,
            )
        )
        for server in servers:
            await stack.enter_async_context(server(sandbox))
        await stack.enter_async_context(serving_loopback(sandbox, await listener))
        stack.push_async_callback(sandbox.names.close)
        pod.adopt(stack.pop_all())
    return pod


async def _implementation(request: SandboxRequest, config: Config) -> VirtiofsdImplementation | None:
    """That of the virtiofsd which will be needed; None if none is, as far as is known."""
    return await virtiofsd_implementation(config.qemu.virtio_fs_daemon) if request.shares else None


def _at_once(
    request: SandboxRequest, config: Config, facts: HostFacts, size: VmSize, accelerator: Accelerator
) -> VmSize:
    """A pod grows with its containers. One whose VMM adds no memory has from its start what it was announced to need,
    and at least what a sandbox without limits has: the host pays for what the guest touches."""
    if capabilities_of(config, facts, accelerator).memory_hotplug:
        return size
    usual = 0 if request.fixed else size_for(config, facts, (ContainerLimits(),)).mem_mib
    mem_mib = max(size.mem_mib, usual)
    return structs.replace(size, mem_mib=mem_mib, max_mem_mib=mem_mib)


async def _netns_of(request: SandboxRequest) -> Path | None:
    """That of the engine; or a new one, for it to fill."""
    if request.netns != "":
        return Path(request.netns) if request.netns is not None else None
    netns = netns_path(request.sandbox_id)
    await make_netns(netns)
    return netns


@contextlib.asynccontextmanager
async def claimed(store: StateStore, record: SandboxRecord, again: SandboxRecord | None = None) -> AsyncIterator[None]:
    """Take the sandbox's id, and own it while the block runs; the first thing written, the last removed.

    If the block fails before the sandbox kept a record of its own (Pod.close), all is removed; or, if it was there
    before, as `again` says, it is at rest as it was, and its record says why. Raises AlreadyExists, NotFound.
    """
    lock = store.reclaim(record) if again is not None else store.create(record)
    try:
        yield
    except BaseException as exc:
        if again is not None or not _has_settled(store, record.sandbox_id):
            try:
                if again is not None:
                    await finish(put_back(store, again, why_not(exc)), name="put-back")
                else:
                    await finish(remove_sandbox(store, record.sandbox_id), name="unclaim")
            except KatapodError as left:  # beside the first cause, which is what the caller gets
                log.error("%s", left)
        raise
    finally:
        os.close(lock)


def _has_settled(store: StateStore, sandbox_id: str) -> bool:
    with contextlib.suppress(KatapodError):
        return store.read(sandbox_id).state is State.STOPPED
    return False
