"""The one way to a sandbox, whoever asks: sized, claimed, on record, planned, started, and reachable.

Each step has its release beside it. Until all are done nothing of them outlives a failure; then they are the Pod's.
"""

import contextlib
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

from katapod.host.cgroup import prepare_cgroup
from katapod.host.facts import collect_host_facts, virtiofsd_dialect
from katapod.host.named_netns import make_netns, netns_path
from katapod.host.process_metrics import CallTimes
from katapod.host.state import StateStore
from katapod.host.tasks import beside, finish
from katapod.host.trace import span
from katapod.model.config import Config
from katapod.model.errors import KatapodError
from katapod.model.record import SandboxRecord, State
from katapod.model.sizing import VmSize
from katapod.plan.cgroup import CgroupPlan
from katapod.sandbox.attachment import attached, prepare_attachment
from katapod.sandbox.control import control_socket
from katapod.sandbox.lifecycle import start_sandbox
from katapod.sandbox.loopback import listening_on_loopback, loopback_door
from katapod.sandbox.management_door import management_door
from katapod.sandbox.planning import RootDisk, plan_sandbox
from katapod.sandbox.pod import Pod, size_of
from katapod.sandbox.pool import ReadyMachine
from katapod.sandbox.proof import accelerator_for
from katapod.sandbox.recovery import reap_dead, remove_sandbox
from katapod.sandbox.request import SandboxRequest
from katapod.sandbox.start_record import new_record

__all__ = ["claimed", "open_sandbox"]

log = logging.getLogger(__name__)


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
    call_times: Sequence[CallTimes] = (),
    tell: Callable[[str], None] = log.warning,
    shut_down: Callable[[], None] | None = None,
) -> Pod:
    """Start a sandbox, in the machine `ready` if that fits. On failure, or when cancelled, nothing of it is left.

    `root_disk` finds that of the first container once the name is taken; plugins attach the network meanwhile.
    `call_times` are shown among the sandbox's metrics. `tell` hears what a proof of the accelerator has found.
    `shut_down` is called when another command asks for the sandbox's end; None: that is refused.

    Raises AlreadyExists, UsageError, HostLacks, and as start_sandbox.
    """
    facts = collect_host_facts()
    size = size_of(request, config, facts, (request.limits,) if request.limits is not None else ())
    for told in size.clamped:
        log.warning("%s: %s", request.sandbox_id, told)
    cgroup = _cgroup_of(request, config, size)
    with span("look for dead owners"):
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
            cgroups=cgroup.directories if cgroup is not None else (),
        )
        await stack.enter_async_context(claimed(store, record))
        attaching = None
        if network is not None:
            attaching = await stack.enter_async_context(attached(network, request.sandbox_id))
        netns = Path(network.netns) if network is not None else await _netns_of(request)
        level = logging.INFO if request.fixed else logging.WARNING  # only engines forward ports so
        listener = await stack.enter_async_context(listening_on_loopback(netns, level))
        dialect = await stack.enter_async_context(
            beside(virtiofsd_dialect(config.qemu.virtio_fs_daemon), name="dialect")
        )
        disk = await root_disk()
        verdict = await accelerator_for(config, facts, store.layout, request.sandbox_id, request.accelerator)
        if verdict.fresh:
            tell(verdict.describe())
        plan = plan_sandbox(
            record,
            config,
            facts,
            store.layout,
            accelerator=verdict.accelerator,
            remedy=verdict.remedy,
            proof_key=verdict.key,
            dialect=await dialect,
            size=size,
            hostname=request.hostname,
            dns=request.dns,
            shm_size_bytes=request.shm_size_bytes,
            netns=netns,
            cgroup=cgroup,
            root_disk=disk,
        )
        sandbox = await start_sandbox(plan, store, ready, attaching)
        pod = Pod(sandbox, request, config, facts)
        stack.push_async_callback(pod.release)
        pod.warned = bool(size.clamped)
        await stack.enter_async_context(
            control_socket(sandbox.paths, lambda: list(pod.containers.values()), shut_down or pod.refuse_shutdown)
        )
        await stack.enter_async_context(management_door(sandbox, call_times))
        await stack.enter_async_context(loopback_door(sandbox, await listener))
        pod.adopt(stack.pop_all())
    return pod


def _cgroup_of(request: SandboxRequest, config: Config, size: VmSize) -> CgroupPlan | None:
    if request.cgroups_path is None:
        return None
    return prepare_cgroup(
        request.sandbox_id,
        request.cgroups_path,
        sandbox_cgroup_only=config.runtime.sandbox_cgroup_only,
        mem_mib=size.mem_mib,
        beside_mib=config.katapod.translation_cache + size.host_overhead_mib,
    )


async def _netns_of(request: SandboxRequest) -> Path | None:
    """That of the engine; or a new one, for it to fill."""
    if request.netns != "":
        return Path(request.netns) if request.netns is not None else None
    netns = netns_path(request.sandbox_id)
    await make_netns(netns)
    return netns


@contextlib.asynccontextmanager
async def claimed(store: StateStore, record: SandboxRecord) -> AsyncIterator[None]:
    """Take the sandbox's id, and own it while the block runs; the first thing written, the last removed.

    If the block fails before the sandbox kept a record of its own (Pod.close), all is removed.
    Raises AlreadyExists.
    """
    lock = store.create(record)
    try:
        yield
    except BaseException:
        if not _has_settled(store, record.sandbox_id):
            try:
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
