"""Containers in a sandbox: their files on the host's side, their life, their execs."""

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Callable, Collection, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from katapod.host.event_log import note_event
from katapod.host.removal import clear_away, remove_tree
from katapod.host.state import write_atomically
from katapod.model import oci
from katapod.model.errors import KatapodError, NoSpace
from katapod.model.layout import GUEST_BUNDLES, GUEST_SANDBOX_DIR, GUEST_SHARE, SHM
from katapod.model.record import DEFAULT_STOP_TIMEOUT_S, ContainerRecord, State
from katapod.plan.container_spec import etc_files
from katapod.plan.guest_spec import resources_for_guest, shares_pid_namespace, strip_for_guest
from katapod.rpc.features import BUNDLE_FILES
from katapod.rpc.oci_message import features_needed, resources_to_message, spec_to_message
from katapod.rpc.pb import agent_pb2
from katapod.rpc.status import StatusCode
from katapod.sandbox.block_devices import close_block_devices, open_block_devices
from katapod.sandbox.client import require_features, string_user
from katapod.sandbox.errors import AgentFailed, command_error
from katapod.sandbox.hooks import HookedContainer
from katapod.sandbox.lifecycle import Sandbox
from katapod.sandbox.rootfs import Rootfs, close_root_disk, open_rootfs
from katapod.sandbox.states import check_move, require
from katapod.sandbox.stdio import GuestProcess, Sink, Source, carry

__all__ = ["Container", "ContainerPlan", "Rootfs", "create_container"]

log = logging.getLogger(__name__)


class ContainerPlan(Struct, frozen=True):
    container_id: str
    image: str
    spec: oci.Spec
    rootfs: Rootfs
    user: str = ""  # USER[:GROUP], resolved in the guest against the container's own files; empty: the spec's
    groups: tuple[str, ...] = ()  # that the user is in besides its own, by name or number
    image_digest: str = ""
    stop_signal: int = 15
    stop_timeout_s: int | None = DEFAULT_STOP_TIMEOUT_S
    volumes: tuple[str, ...] = ()  # names of those of the store, whose mounts the spec has
    guest_seccomp: bool = True
    create_timeout_s: float = 60.0
    etc: dict[str, str] | None = None  # files of /etc, by name; None: those that name the container
    holds_pid_namespace: bool = False  # containers that join the sandbox's PID namespace join this one's
    bundle: Path | None = None  # of the OCI runtime specification, whose hooks are run; None: it has none
    host_pid: int = 0  # the process that stands for it on the host, for its hooks; 0: the VMM

    def record(self) -> ContainerRecord:
        process = self.spec.process
        return ContainerRecord(
            container_id=self.container_id,
            image=self.image,
            command=process.args,
            terminal=process.terminal,
            user=self.user,
            groups=self.groups,
            image_digest=self.image_digest,
            stop_signal=self.stop_signal,
            stop_timeout_s=self.stop_timeout_s,
            volumes=self.volumes,
        )


class Container:
    """A container of a live sandbox."""

    def __init__(self, sandbox: Sandbox, plan: ContainerPlan) -> None:
        self.sandbox = sandbox
        self.plan = plan
        self.process = GuestProcess(
            sandbox.agent, plan.container_id, plan.container_id, terminal=plan.spec.process.terminal
        )
        self.ended = asyncio.Event()  # it has stopped, which is on record
        self.out_of_memory = asyncio.Event()  # its limit made the guest kill a process of it
        self.killed = False  # by SIGKILL from here
        self.hooks = HookedContainer(plan.container_id, plan.bundle, plan.spec)

    @property
    def container_id(self) -> str:
        return self.plan.container_id

    @property
    def record(self) -> ContainerRecord:
        return next(item for item in self.sandbox.record.containers if item.container_id == self.container_id)

    def save(self, **changes: Any) -> None:
        """Change this container's part of the record, on disk too."""
        if "state" in changes and changes["state"] is not self.record.state:
            check_move(self.container_id, self.record.state, changes["state"])
        changed = msgspec.structs.replace(self.record, **changes)
        others = self.sandbox.record.containers
        self.sandbox.save(
            containers=tuple(changed if item.container_id == self.container_id else item for item in others)
        )
        if changed.state is State.STOPPED:
            self.ended.set()

    def tell(self, action: str, **more: object) -> None:
        """Have it among the events of this host."""
        note_event(self.sandbox.store.layout, action, self.sandbox.record, **more)

    async def start(self) -> None:
        require("start", self.container_id, self.record.state, State.CREATED)
        request = agent_pb2.StartContainerRequest(container_id=self.container_id)
        try:
            await self.sandbox.guard(self.sandbox.agent.call("StartContainer", request))
        except AgentFailed as exc:
            raise command_error(exc) from exc
        self.save(state=State.RUNNING, started_at=time.time())
        self.tell("start")

    async def carry(self, stdin: Source | None, stdout: Sink, stderr: Sink) -> int:
        """Carry the streams of the running container to its end, record that, and return its exit code."""
        code = await self.sandbox.guard(carry(self.process, stdin, stdout, stderr))
        try:
            self.save(state=State.STOPPED, finished_at=time.time(), exit_code=code)
        except NoSpace as exc:  # whoever waits for the exit code gets it all the same
            log.error("cannot record the exit of %s: %s", self.container_id, exc)
        return code

    async def kill(self, signal_number: int, *, everyone: bool = False) -> None:
        """Send a signal to the container's init; with `everyone`, SIGKILL reaches every process of it."""
        require("kill", self.container_id, self.record.state, State.CREATED, State.RUNNING, State.PAUSED)
        request = agent_pb2.SignalProcessRequest(
            container_id=self.container_id, exec_id="" if everyone else self.container_id, signal=signal_number
        )
        if signal_number == signal.SIGKILL:
            self.killed = True
        await self.sandbox.guard(self.sandbox.agent.call("SignalProcess", request))

    def note_stop_asked(self) -> None:
        """Its end is wanted: no policy starts it again."""
        if not self.sandbox.record.stop_asked:
            with contextlib.suppress(NoSpace):  # whoever wants to free space by this may
                self.sandbox.save(stop_asked=True)

    async def pause(self) -> None:
        require("pause", self.container_id, self.record.state, State.RUNNING)
        request = agent_pb2.PauseContainerRequest(container_id=self.container_id)
        await self.sandbox.guard(self.sandbox.agent.call("PauseContainer", request))
        self.save(state=State.PAUSED)
        self.tell("pause")

    async def resume(self) -> None:
        require("resume", self.container_id, self.record.state, State.PAUSED)
        request = agent_pb2.ResumeContainerRequest(container_id=self.container_id)
        await self.sandbox.guard(self.sandbox.agent.call("ResumeContainer", request))
        self.sandbox.clock.look_soon()
        self.save(state=State.RUNNING)
        self.tell("unpause")

    async def update(self, resources: oci.Resources) -> None:
        """Change the limits of a container. Raises AgentFailed, KatapodError."""
        require("update", self.container_id, self.record.state, State.CREATED, State.RUNNING, State.PAUSED)
        request = agent_pb2.UpdateContainerRequest(
            container_id=self.container_id, resources=resources_to_message(resources_for_guest(resources))
        )
        await self.sandbox.guard(self.sandbox.agent.call("UpdateContainer", request))

    async def remove(self) -> None:
        """Take a container that does not run out of a sandbox that goes on, or that has died already.

        After a failure it can be called again, and takes up what is left. Raises InvalidState, AgentFailed;
        KatapodError that names all that the host could not remove.
        """
        require("remove", self.container_id, self.record.state, State.CREATED, State.STOPPED)
        problems: list[str] = []
        if not self.sandbox.death.done():
            await self._remove_in_guest()
            steps: tuple[Callable[[], Coroutine[Any, Any, None]], ...] = (
                lambda: close_root_disk(self.sandbox, self.container_id),
                lambda: close_block_devices(self.sandbox, self.container_id, self.plan.spec),
                lambda: self.sandbox.direct_volumes.close(self.sandbox, self.container_id),
            )
            for step in steps:
                try:
                    await step()
                except (OSError, KatapodError) as exc:
                    if not self.sandbox.death.done():  # its disks are gone with the machine
                        problems.append(str(exc))
        problems += remove_host_files(self.sandbox, self.container_id)
        if problems:
            raise KatapodError(
                f"cannot remove all of container {self.container_id}: {'; '.join(problems)}", hint="try again"
            )
        self.sandbox.save(
            containers=tuple(item for item in self.sandbox.record.containers if item.container_id != self.container_id)
        )

    async def _remove_in_guest(self) -> None:
        request = agent_pb2.RemoveContainerRequest(container_id=self.container_id)
        try:
            await self.sandbox.guard(self.sandbox.agent.call("RemoveContainer", request))
        except AgentFailed as exc:
            if (
                exc.context.get("code") is not StatusCode.INVALID_ARGUMENT
            ):  # by which it says that it has none of that id (any more)
                raise


async def create_container(sandbox: Sandbox, plan: ContainerPlan) -> Container:
    """Prepare the files, then have the agent create the container; undone if that fails.

    Raises CommandNotFound, CommandNotExecutable, AgentFailed, NotFound (a volume), KatapodError.
    """
    sandbox.save(containers=(*sandbox.record.containers, plan.record()))
    write_atomically(sandbox.paths.spec(plan.container_id), oci.encode_spec(plan.spec))
    try:
        rootfs = await open_rootfs(sandbox, plan.container_id, plan.rootfs)
        devices = await open_block_devices(sandbox, plan.container_id, plan.spec)
        volumes, storages = await sandbox.direct_volumes.open(sandbox, plan.container_id, plan.spec)
        given, files = await _give_files(sandbox, plan)
        volumes |= given
        if rootfs.shared or any(oci.is_of_host(each) and each.destination not in volumes for each in plan.spec.mounts):
            await sandbox.open_share()
        sources = volumes | prepare_host_files(sandbox, plan, mounted=volumes)
        spec = strip_for_guest(
            plan.spec,
            root_path=rootfs.path,
            mount_sources=sources,
            guest_seccomp=plan.guest_seccomp,
        )
        message = spec_to_message(spec)
        await sandbox.guard(require_features(sandbox.agent, features_needed(message.Process, message.Linux)))
        request = agent_pb2.CreateContainerRequest(
            container_id=plan.container_id,
            exec_id=plan.container_id,
            OCI=message,
            sandbox_pidns=plan.holds_pid_namespace or shares_pid_namespace(plan.spec),
            string_user=string_user(plan.user, plan.groups),
            storages=(*sandbox.share_storages, *rootfs.storages, *storages),
            devices=devices,
            automounts=sandbox.volumes.automounts(plan.container_id),
            files=files,
        )
        try:
            await sandbox.guard(sandbox.agent.call("CreateContainer", request, timeout_s=plan.create_timeout_s))
        except AgentFailed as exc:
            raise command_error(exc) from exc
    except BaseException as exc:
        if isinstance(exc, Exception):  # a cancelled start ends the sandbox: no need to wait for its guest
            with contextlib.suppress(KatapodError):
                await close_root_disk(sandbox, plan.container_id)
            with contextlib.suppress(KatapodError):
                await close_block_devices(sandbox, plan.container_id, plan.spec)
            with contextlib.suppress(KatapodError):
                await sandbox.direct_volumes.close(sandbox, plan.container_id)
        for problem in remove_host_files(sandbox, plan.container_id):
            log.warning("something of %s stays until its sandbox ends: %s", plan.container_id, problem)
        raise
    container = Container(sandbox, plan)
    container.save(state=State.CREATED)
    return container


async def _give_files(sandbox: Sandbox, plan: ContainerPlan) -> tuple[dict[str, str], list[agent_pb2.BundleFile]]:
    """The container's own files of /etc, which the agent writes, so that nothing has to be shared for them. Returns, by
    mount destination, where it does, and the files; neither if the agent cannot. Raises AgentFailed."""
    own = _own_mounts(sandbox, plan)
    if not own or BUNDLE_FILES not in await sandbox.guard(sandbox.agent.features()):
        return {}, []
    etc, below = _files_of_etc(plan), f"{GUEST_BUNDLES}/{plan.container_id}/files"
    files = [agent_pb2.BundleFile(name=name, data=etc[name].encode()) for name in own]
    return {mount.destination: f"{below}/{name}" for name, mount in own.items()}, files


def _own_mounts(sandbox: Sandbox, plan: ContainerPlan) -> dict[str, oci.Mount]:
    """Those of its files of /etc, by the files' names."""
    etc = sandbox.paths.etc(plan.container_id)
    return {Path(each.source).name: each for each in plan.spec.mounts if Path(each.source).parent == etc}


def _files_of_etc(plan: ContainerPlan) -> dict[str, str]:
    """Their content, by name."""
    return etc_files(plan.spec.hostname) if plan.etc is None else plan.etc


def prepare_host_files(sandbox: Sandbox, plan: ContainerPlan, mounted: Collection[str] = ()) -> dict[str, str]:
    """Mount into the share what is found on the host, the container's own files of /etc, which are written first, among
    it; but for mounts whose destination is among `mounted`: the guest has them.

    Returns, by mount destination, the path under which the guest finds the source.
    """
    own = {name: mount for name, mount in _own_mounts(sandbox, plan).items() if mount.destination not in mounted}
    if own:
        etc, content = sandbox.paths.etc(plan.container_id), _files_of_etc(plan)
        etc.mkdir(mode=0o755, parents=True)  # beside its layer, or in a directory of its own
        for name in own:
            (etc / name).write_text(content[name])
            (etc / name).chmod(0o644)
    sources: dict[str, str] = {}
    for mount in plan.spec.mounts:
        if mount.destination == SHM and mount.type == "tmpfs":  # one for the whole sandbox
            sources[mount.destination] = f"{GUEST_SANDBOX_DIR}/shm"
        if not oci.is_of_host(mount) or mount.destination in mounted:
            continue
        ours = mount in own.values()
        sources[mount.destination] = f"{GUEST_SHARE}/{sandbox.volumes.add(mount, plan.container_id, ours=ours)}"
    return sources


def remove_host_files(sandbox: Sandbox, container_id: str) -> list[str]:
    """Remove what of the container is in the share, and its layer; returns what did not work. Idempotent."""
    problems = sandbox.volumes.drop(container_id)
    for remove in (
        partial(remove_tree, sandbox.paths.mounts / container_id),
        partial(clear_away, sandbox.store.layout, sandbox.paths.layers / container_id),
    ):
        try:
            remove()
        except KatapodError as exc:
            problems.append(str(exc))
    return problems
