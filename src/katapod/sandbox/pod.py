"""An open sandbox and its containers, as whoever asked for it has them (opening.py).

It was started for its first container, and lives until it is closed. What containers come later makes it grow.
"""

import asyncio
import contextlib
import logging
import signal

from msgspec import structs

from katapod.host.direct_volumes import read_volume
from katapod.host.facts import HostFacts
from katapod.host.state import StateStore
from katapod.host.trace import span
from katapod.model.config import Config
from katapod.model.errors import AlreadyExists, KatapodError, NotFound
from katapod.model.record import SandboxRecord, State
from katapod.model.sizing import ContainerLimits, HostCapacity, SizeSettings, VmSize, size_pod
from katapod.sandbox.attachment import detach_attachment
from katapod.sandbox.container import Container, ContainerPlan, create_container
from katapod.sandbox.hooks import HookedContainer
from katapod.sandbox.ladder import Needs, needs_of_config
from katapod.sandbox.lifecycle import Sandbox
from katapod.sandbox.planning import size_for
from katapod.sandbox.recovery import release_kept, remove_sandbox
from katapod.sandbox.request import SandboxRequest
from katapod.tasks import beside, finish

__all__ = ["Pod", "asked_of_fixed", "needs_of", "size_of"]

log = logging.getLogger(__name__)


class Pod:
    """A live sandbox, owned by this process, and its containers by id."""

    def __init__(
        self,
        sandbox: Sandbox,
        request: SandboxRequest,
        config: Config,
        facts: HostFacts,
    ) -> None:
        self.sandbox = sandbox
        self.config = config
        self.containers: dict[str, Container] = {}
        self._request = request
        self._facts = facts
        self._limits: dict[str, ContainerLimits] = {}
        self._sizing = asyncio.Lock()
        self.warned = False  # that the limits ask for more than the VM can have
        self._stack = contextlib.AsyncExitStack()
        self._keep, self._expendable = request.again is not None, False
        self._failed: HookedContainer | None = None  # its first container, if a hook of its creation failed

    def find(self, container_id: str) -> Container:
        """Raises NotFound."""
        if container_id not in self.containers:
            raise NotFound(f"cannot find container {container_id} in sandbox {self.sandbox.sandbox_id}")
        return self.containers[container_id]

    async def create_container(self, plan: ContainerPlan, limits: ContainerLimits | None) -> Container:
        """Create a container, for which the sandbox grows first; `limits` None: it is not counted (a pause container).

        Then its hooks are run on the host. If one of them fails the container is removed again; the sandbox's first
        one goes with it, since whoever asked for the sandbox closes it then.

        Raises AlreadyExists, UsageError (the host has not that much), HookFailed, and as create_container.
        """
        if plan.container_id in self.containers:
            raise AlreadyExists(f"cannot create container {plan.container_id}: it exists already")
        if limits is not None:
            await self.resize_for(plan.container_id, limits)
        try:
            container = await create_container(self.sandbox, plan)
        except BaseException:
            self._limits.pop(plan.container_id, None)
            raise
        self.containers[plan.container_id] = container
        try:
            await container.hooks.created(plan.host_pid or self.sandbox.vm.pid)
        except BaseException:
            await self._give_up(container)
            raise
        return container

    async def _give_up(self, container: Container) -> None:
        if container.container_id == self.sandbox.sandbox_id:
            self._failed = container.hooks
            return
        with contextlib.suppress(KatapodError):
            await container.kill(signal.SIGKILL, everyone=True)
            await self.remove_container(container.container_id)
        await container.hooks.stopped()

    async def resize_for(self, container_id: str, limits: ContainerLimits) -> None:
        """Give the sandbox the size that all its containers need with these limits for one of them.

        It never shrinks, and with static_sandbox_resource_mgmt it stays as it is.
        Raises UsageError, VmmRefused, AgentFailed, KatapodError.
        """
        async with self._sizing:
            wanted = {**self._limits, container_id: limits}
            if not self.config.runtime.static_sandbox_resource_mgmt:
                grows = self.sandbox.plan.vmm.capabilities(self.sandbox.plan.vm).memory_hotplug
                sized = size_of if grows else asked_of_fixed
                size = sized(self._request, self.config, self._facts, tuple(wanted.values()))
                self._warn_of(size)
                await self.sandbox.resize(vcpus=size.vcpus, mem_mib=size.mem_mib)
            self._limits = wanted

    def _warn_of(self, size: VmSize) -> None:
        """Once, however many containers come."""
        if size.clamped and not self.warned:
            self.warned = True
            for told in size.clamped:
                log.warning("%s: %s", self._request.sandbox_id, told)

    async def remove_container(self, container_id: str) -> None:
        """Take out a container that does not run. Raises NotFound, InvalidState, AgentFailed."""
        await self.find(container_id).remove()
        del self.containers[container_id]
        self._limits.pop(container_id, None)

    def adopt(self, stack: contextlib.AsyncExitStack) -> None:
        """Take over the releases of what open_sandbox acquired."""
        self._stack = stack

    async def close(self, *, keep: bool = False, expendable: bool = False) -> None:
        """End the sandbox and remove all that it held; runs to its end whatever happens to the caller. Idempotent;
        after a failure the next call takes up what is left. Raises KatapodError.

        With `keep` its record, as stopped, and its logs stay. `expendable` as for Sandbox.close.
        """
        self._keep, self._expendable = keep, expendable
        stack, self._stack = self._stack, contextlib.AsyncExitStack()
        try:
            await finish(stack.aclose(), name="close-pod")
        except BaseException:
            self._stack.push_async_callback(remove_sandbox, self.sandbox.store, self.sandbox.sandbox_id)
            raise
        finally:
            failed, self._failed = self._failed, None
            if failed is not None:
                await failed.stopped()

    async def release(self) -> None:
        """End the VM, then remove what is on disk, or bring it to rest. Raises KatapodError."""
        store, sandbox_id = self.sandbox.store, self.sandbox.sandbox_id
        try:
            async with beside(self._detach(), name="detach-network", may_fail=True) as detaching:
                with span("close"):
                    await self.sandbox.close(expendable=self._expendable)
                await asyncio.wait({detaching})
        except ExceptionGroup as group:
            for error in group.exceptions:
                log.error("sandbox %s: %s", sandbox_id, error)
        finally:
            if self._keep:
                self.sandbox.save(state=State.STOPPED, vmm_pid=0)
                store.drop_devices(sandbox_id)
                await release_kept(store, sandbox_id)
                self._note_rest(store.read(sandbox_id))
            else:
                await remove_sandbox(store, sandbox_id)

    def _note_rest(self, record: SandboxRecord) -> None:
        """Of a container that can be started again, for after a start of the host."""
        if not self.sandbox.paths.kept_request.exists():
            return
        try:
            self.sandbox.store.keep(record)
        except KatapodError as exc:
            log.info("a start of the host will find %s as it was when it ran: %s", record.sandbox_id, exc)

    async def _detach(self) -> None:
        """Undo the attachment to a network beside the end of the VM, once nobody is left who could want it. What does
        not work is tried again, and told of, when the sandbox is removed. A record that stays has to name its namespace
        until that is gone: release_kept does both."""
        record = self.sandbox.record
        if (
            self._keep
            or record.attachment is None
            or any(item.state is not State.STOPPED for item in record.containers)
        ):
            return
        if not await detach_attachment(record.attachment, record.sandbox_id):
            self.sandbox.save(attachment=None)

    def refuse_shutdown(self) -> None:
        """The answer to another command that asks for its end."""
        raise KatapodError(
            f"cannot shut down {self.sandbox.sandbox_id}: it belongs to a container engine",
            hint="use the engine's own command",
        )


def needs_of(request: SandboxRequest, config: Config, size: VmSize, store: StateStore) -> Needs:
    """What the sandbox asks of its VMM. What later containers of a pod will ask for an engine announces; a pod that is
    announced without a memory limit has none for which memory would have to be added."""
    known = request.announced is not None
    return structs.replace(
        needs_of_config(config),
        vcpus=size.vcpus,
        resized=request.is_pod and not (known or config.runtime.static_sandbox_resource_mgmt),
        disks=request.is_pod
        or request.block_devices
        or any(read_volume(store.layout, path) for path in request.volumes),
        programs_32bit=request.programs_32bit,
    )


def size_of(
    request: SandboxRequest, config: Config, facts: HostFacts, containers: tuple[ContainerLimits, ...]
) -> VmSize:
    """The size of the VM for these of its containers. Raises UsageError if it does not fit the host."""
    if request.fixed:
        return size_for(config, facts, containers)
    static = config.runtime.static_sandbox_resource_mgmt
    return size_pod(
        SizeSettings.of(config),
        HostCapacity(cpus=facts.cpus, memory_mib=facts.mem_mib),
        containers,
        announced=request.announced or (request.limits if static else None),
        cpus_asked=request.cpus_asked,
        static=static,
    )


def asked_of_fixed(
    request: SandboxRequest, config: Config, facts: HostFacts, containers: tuple[ContainerLimits, ...]
) -> VmSize:
    """What the limits of these containers ask of a VM that does not grow: those without one use what there is. Raises
    as size_of."""
    size = size_of(request, config, facts, tuple(each for each in containers if each.memory_bytes is not None))
    cpus = size_of(request, config, facts, tuple(each for each in containers if each.cpus is not None))
    return structs.replace(size, vcpus=cpus.vcpus)
