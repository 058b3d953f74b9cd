"""A sandbox for doors that are told of its containers one by one: containerd's shim.

The sandbox is started for its first container and lives until it is closed. What containers come later makes it grow.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from katapod.host.cgroup import prepare_cgroup
from katapod.host.facts import HostFacts, collect_host_facts, virtiofsd_dialect
from katapod.host.named_netns import make_netns, netns_path
from katapod.host.process_metrics import CallTimes
from katapod.host.state import StateStore
from katapod.host.tasks import finish
from katapod.model.config import Config
from katapod.model.errors import AlreadyExists, KatapodError, NotFound
from katapod.model.ids import ContainerId
from katapod.model.record import SandboxRecord
from katapod.model.sizing import ContainerLimits, HostCapacity, SizeSettings, VmSize, size_pod
from katapod.plan.container_spec import DEFAULT_SHM_BYTES
from katapod.sandbox.container import Container, ContainerPlan, create_container
from katapod.sandbox.control import control_socket
from katapod.sandbox.lifecycle import Sandbox, start_sandbox
from katapod.sandbox.loopback import loopback_door
from katapod.sandbox.management_door import management_door
from katapod.sandbox.planning import plan_sandbox
from katapod.sandbox.proof import accelerator_for
from katapod.sandbox.recovery import reap_dead, remove_sandbox
from katapod.sandbox.runner import claimed

__all__ = ["Pod", "PodRequest", "open_pod"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PodRequest:
    """What is known when a sandbox is asked for.

    `limits`: of its first container; None: that one is not counted (a pause container). `announced` and `cpus_asked`
    as in size_pod. `netns`: path of the pod's network namespace, empty: one is made, which the engine fills later;
    None: there is none. `cgroups_path`: of the OCI spec. `dns`: lines of the pod's resolv.conf, for the guest itself.
    """

    sandbox_id: ContainerId
    hostname: str
    limits: ContainerLimits | None = None
    announced: ContainerLimits | None = None
    cpus_asked: int = 0
    netns: str | None = None
    cgroups_path: str = ""
    dns: tuple[str, ...] = ()
    shm_size_bytes: int = DEFAULT_SHM_BYTES
    accelerator: str = ""
    several: bool = False  # its first container is only the pod's own
    labels: dict[str, str] = field(default_factory=dict)


class Pod:
    """A live sandbox, owned by this process, and its containers by id."""

    def __init__(
        self,
        sandbox: Sandbox,
        request: PodRequest,
        config: Config,
        facts: HostFacts,
        stack: contextlib.AsyncExitStack,
    ) -> None:
        self.sandbox = sandbox
        self.config = config
        self.containers: dict[str, Container] = {}
        self._request = request
        self._facts = facts
        self._limits: dict[str, ContainerLimits] = {}
        self._sizing = asyncio.Lock()
        self.warned = False  # that the limits ask for more than the VM can have
        self._stack = stack

    def find(self, container_id: str) -> Container:
        """Raises NotFound."""
        if container_id not in self.containers:
            raise NotFound(f"cannot find container {container_id} in sandbox {self.sandbox.sandbox_id}")
        return self.containers[container_id]

    async def create_container(self, plan: ContainerPlan, limits: ContainerLimits | None) -> Container:
        """Create a container, for which the sandbox grows first; `limits` None: it is not counted (a pause container).

        Raises AlreadyExists, UsageError (the host has not that much), and as create_container.
        """
        if plan.container_id in self.containers:
            raise AlreadyExists(f"cannot create container {plan.container_id}: it exists already")
        if limits is not None:
            await self.grow_for(plan.container_id, limits)
        try:
            container = await create_container(self.sandbox, plan)
        except BaseException:
            self._limits.pop(plan.container_id, None)
            raise
        self.containers[plan.container_id] = container
        return container

    async def grow_for(self, container_id: str, limits: ContainerLimits) -> None:
        """Give the sandbox the size that all its containers need with these limits for one of them.

        It never shrinks, and with static_sandbox_resource_mgmt it stays as it is.
        Raises UsageError, VmmRefused, AgentFailed, KatapodError.
        """
        async with self._sizing:
            wanted = {**self._limits, container_id: limits}
            if not self.config.runtime.static_sandbox_resource_mgmt:
                size = _size(self._request, self.config, self._facts, tuple(wanted.values()))
                self._warn_of(size)
                await self.sandbox.grow(vcpus=size.vcpus, mem_mib=size.mem_mib)
            self._limits = wanted

    def _warn_of(self, size: VmSize) -> None:
        """Once, however many containers come."""
        if size.clamped and not self.warned:
            self.warned = True
            _warn(self._request.sandbox_id, size)

    async def remove_container(self, container_id: str) -> None:
        """Take out a container that does not run. Raises NotFound, InvalidState, AgentFailed."""
        await self.find(container_id).remove()
        del self.containers[container_id]
        self._limits.pop(container_id, None)

    async def close(self) -> None:
        """End the sandbox and remove all that it held; runs to its end whatever happens to the caller. Idempotent;
        after a failure the next call takes up what is left. Raises KatapodError."""
        stack, self._stack = self._stack, contextlib.AsyncExitStack()
        try:
            await finish(stack.aclose(), name="close-pod")
        except BaseException:
            self._stack.push_async_callback(remove_sandbox, self.sandbox.store, self.sandbox.sandbox_id)
            raise


async def open_pod(request: PodRequest, config: Config, store: StateStore, call_times: Sequence[CallTimes] = ()) -> Pod:
    """Start a sandbox. On failure, or when cancelled, nothing of it is left. `call_times` are shown among its metrics.

    Raises AlreadyExists, UsageError, and as start_sandbox.
    """
    facts = collect_host_facts()
    first = (request.limits,) if request.limits is not None else ()
    size = _size(request, config, facts, first)
    _warn(request.sandbox_id, size)
    beside_mib = config.katapod.translation_cache + size.host_overhead_mib
    cgroup = prepare_cgroup(
        request.sandbox_id,
        request.cgroups_path,
        sandbox_cgroup_only=config.runtime.sandbox_cgroup_only,
        mem_mib=size.mem_mib,
        beside_mib=beside_mib,
    )
    await reap_dead(store)
    record = SandboxRecord(
        sandbox_id=request.sandbox_id,
        created_at=time.time(),
        owner_pid=os.getpid(),
        boot_id=facts.boot_id,
        auto_remove=True,
        pod=request.several,
        labels=request.labels,
        cgroups=cgroup.directories if cgroup is not None else (),
    )
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(claimed(store, record))
        netns = Path(request.netns) if request.netns else None
        if request.netns == "":
            netns = netns_path(request.sandbox_id)
            await make_netns(netns)
        verdict = await accelerator_for(config, facts, store.layout, request.sandbox_id, request.accelerator)
        if verdict.fresh:
            log.warning("%s", verdict.describe())
        plan = plan_sandbox(
            request.sandbox_id,
            config,
            facts,
            store.layout,
            accelerator=verdict.accelerator,
            remedy=verdict.remedy,
            proof_key=verdict.key,
            dialect=await virtiofsd_dialect(config.qemu.virtio_fs_daemon),
            size=size,
            owner_pid=os.getpid(),
            hostname=request.hostname,
            dns=request.dns,
            shm_size_bytes=request.shm_size_bytes,
            auto_remove=True,
            labels=request.labels,
            netns=netns,
            cgroup=cgroup,
            pod=request.several,
        )
        sandbox = await start_sandbox(plan, store)
        stack.push_async_callback(remove_sandbox, store, request.sandbox_id)
        stack.push_async_callback(_close_sandbox, sandbox)
        pod = Pod(sandbox, request, config, facts, contextlib.AsyncExitStack())
        pod.warned = bool(size.clamped)
        await stack.enter_async_context(
            control_socket(sandbox.paths, lambda: list(pod.containers.values()), lambda: _refuse_shutdown(sandbox))
        )
        await stack.enter_async_context(management_door(sandbox, call_times))
        await stack.enter_async_context(loopback_door(sandbox, netns))
        pod._stack = stack.pop_all()
    return pod


def _size(request: PodRequest, config: Config, facts: HostFacts, containers: tuple[ContainerLimits, ...]) -> VmSize:
    static = config.runtime.static_sandbox_resource_mgmt
    return size_pod(
        SizeSettings.of(config),
        HostCapacity(cpus=facts.cpus, memory_mib=facts.mem_mib),
        containers,
        announced=request.announced or (request.limits if static else None),
        cpus_asked=request.cpus_asked,
        static=static,
    )


def _warn(sandbox_id: str, size: VmSize) -> None:
    for told in size.clamped:
        log.warning("sandbox %s: %s", sandbox_id, told)


async def _close_sandbox(sandbox: Sandbox) -> None:
    try:
        await sandbox.close()
    except ExceptionGroup as group:
        for error in group.exceptions:
            log.error("sandbox %s: %s", sandbox.sandbox_id, error)


def _refuse_shutdown(sandbox: Sandbox) -> None:
    raise KatapodError(
        f"cannot shut down {sandbox.sandbox_id}: it belongs to a container engine", hint="use the engine's own command"
    )
