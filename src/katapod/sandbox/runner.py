"""Hold a container from its creation to its end, in a sandbox of its own or one that is open."""

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from msgspec import Struct, field

from katapod.host.logs import BoundedLog
from katapod.host.state import StateStore
from katapod.host.trace import span
from katapod.model import oci
from katapod.model.attachment import AttachmentRecord
from katapod.model.config import Config
from katapod.model.errors import KatapodError
from katapod.model.mount_options import Access, parse_access
from katapod.model.record import State, killed_containers
from katapod.model.run_flags import LOG_BYTES
from katapod.model.sizing import ContainerLimits
from katapod.sandbox.container import Container, ContainerPlan
from katapod.sandbox.lifecycle import Sandbox
from katapod.sandbox.opening import SandboxServer, open_sandbox
from katapod.sandbox.planning import RootDisk
from katapod.sandbox.pod import Pod
from katapod.sandbox.pool import ReadyMachine
from katapod.sandbox.recovery import why_not
from katapod.sandbox.request import SandboxRequest
from katapod.sandbox.rootfs import root_disk_of
from katapod.sandbox.stdio import LogSink, NullSink, Sink, Source, TeeSink
from katapod.sandbox.task import follow, watch_oom
from katapod.tasks import beside, finish

__all__ = [
    "Outcome",
    "Streams",
    "carry_container",
    "created_container",
    "joined_container",
    "run_container",
    "start_container",
]

log = logging.getLogger(__name__)

SIGPIPE_STATUS = 128 + signal.SIGPIPE


class Streams(Struct, frozen=True):
    """Where the container's streams lead on this side."""

    stdin: Source | None = None
    stdout: Sink = field(default_factory=NullSink)
    stderr: Sink = field(default_factory=NullSink)
    keep_log: bool = True
    log_bytes: int = LOG_BYTES


class Outcome(Struct, frozen=True):
    exit_code: int
    oom_killed: bool = False


Prepare = Callable[[], Awaitable[ContainerPlan]]
WithNetwork = Callable[[ContainerPlan, AttachmentRecord | None], ContainerPlan]


def _as_it_is(plan: ContainerPlan, network: AttachmentRecord | None) -> ContainerPlan:
    return plan


async def run_container(
    created: AbstractAsyncContextManager[Container],
    streams: Streams,
    on_started: Callable[[Container], None] = lambda container: None,
) -> Outcome:
    """Run a container, of created_container, to its end. `on_started` hears of it when it runs."""
    async with created as container:
        with contextlib.ExitStack() as files:
            stdout, stderr = _with_log(container.sandbox, streams, files)
            await start_container(container)
            code = await carry_container(container, Streams(streams.stdin, stdout, stderr), on_started)
        return Outcome(code, oom_killed=container.out_of_memory.is_set())


# long: what differs between those who want a container, each a step that they may leave out
@contextlib.asynccontextmanager
async def created_container(
    request: SandboxRequest,
    config: Config,
    store: StateStore,
    prepare: Prepare,
    *,
    ready: ReadyMachine | None = None,
    with_network: WithNetwork = _as_it_is,
    servers: Sequence[SandboxServer] = (),
    tell: Callable[[str], None] = log.warning,
) -> AsyncIterator[Container]:
    """A container in a sandbox of its own, created and not started. The sandbox ends with the block.

    `prepare` finds what it is made of, once its name is taken; `with_network` completes that by what the plugins of its
    network have said, once the sandbox is open. `ready`, `servers` and `tell` as for open_sandbox.

    Whatever happens nothing of the VM stays; with auto_remove nothing at all does, and without it the
    record (with exit code or error), the log and the container's files do, once the container has run, in this sandbox
    or, if that is started `again`, a former one. A cancelled start is as if it had never been.
    """
    paths = store.layout.sandbox(request.sandbox_id)
    prepared: list[ContainerPlan] = []
    stop = asyncio.Event()

    async def find_disk() -> RootDisk | None:
        plan = await prepare()
        prepared.append(plan)
        return root_disk_of(paths, plan.container_id, plan.rootfs)

    pod = await open_sandbox(
        request, config, store, ready=ready, root_disk=find_disk, servers=servers, tell=tell, shut_down=stop.set
    )
    sandbox, plan, container = pod.sandbox, prepared[0], None
    try:
        plan = with_network(plan, sandbox.record.attachment)
        with span("create container"):
            container = await pod.create_container(plan, None)
        if request.again is None:
            container.tell("create")
        await sandbox.wait_resized()  # before its first instruction
        if sandbox.paths.kept_request.exists():
            store.keep(sandbox.record)
        async with (
            beside(watch_oom(sandbox, pod.containers, _tell_of_oom), name="watch-oom"),
            beside(_stop_when_asked(stop, container), name="stopper"),
        ):
            yield container
    except BaseException as exc:
        if _has_run(sandbox):
            _record_error(sandbox, exc)
        elif request.again is not None:
            sandbox.save(containers=request.again.containers, error=why_not(exc))
        raise
    finally:
        keep = _is_kept(request, sandbox)
        if container is not None and _has_run(sandbox):
            container.tell("die", exitCode=container.record.exit_code)
        try:
            await pod.close(keep=keep, expendable=not _writes_to_host(plan, sandbox.paths.data, keep=keep))
        finally:
            if container is not None:
                await finish(container.hooks.stopped(), name="poststop")


def _tell_of_oom(container: Container) -> None:
    container.tell("oom")


@contextlib.asynccontextmanager
async def joined_container(pod: Pod, plan: ContainerPlan, limits: ContainerLimits) -> AsyncIterator[Container]:
    """A container in a sandbox that is open, created and not started; it is ended and removed with the block.

    Raises as Pod.create_container.
    """
    with span("create container"):
        container = await pod.create_container(plan, limits)
    try:
        yield container
    finally:
        await finish(_remove(pod, container), name="remove-container")


async def _remove(pod: Pod, container: Container) -> None:
    """Nothing, but for its hooks, if its sandbox is gone. Raises KatapodError."""
    try:
        if container.record.state is not State.STOPPED:
            await container.kill(signal.SIGKILL, everyone=True)
        if container.record.state not in (State.STOPPED, State.CREATED):  # whoever followed it has given up
            status = await pod.sandbox.guard(container.process.wait())
            container.save(state=State.STOPPED, exit_code=status, finished_at=time.time())
        await pod.remove_container(container.container_id)
    except KatapodError:
        if not pod.sandbox.death.done():
            raise
    finally:
        await container.hooks.stopped()


def _is_kept(request: SandboxRequest, sandbox: Sandbox) -> bool:
    return not request.auto_remove and (request.again is not None or _has_run(sandbox))


def _has_run(sandbox: Sandbox) -> bool:
    return any(item.started_at for item in sandbox.record.containers)


def _writes_to_host(plan: ContainerPlan, own: Path, *, keep: bool) -> bool:
    """Whether anything that the container can write outlives it; what lies below `own` does if it is to `keep` that."""
    if plan.rootfs.direct or (keep and plan.rootfs.kept):
        return True
    return any(
        oci.is_of_host(mount)
        and parse_access(mount.options) is not Access.READ_ONLY
        and not Path(mount.source).is_relative_to(own)
        for mount in plan.spec.mounts
    )


def _record_error(sandbox: Sandbox, exc: BaseException) -> None:
    text = str(exc) if isinstance(exc, KatapodError) else "it was stopped by a signal"
    sandbox.save(error=text, containers=killed_containers(sandbox.record.containers, text, time.time()))


async def start_container(container: Container) -> None:
    """Let a created container run, on the network that its hooks may have made. Raises KatapodError."""
    if container.hooks.set_up_network:
        await container.sandbox.rescan_network()
    with span("start container"):
        await container.start()


async def carry_container(container: Container, streams: Streams, on_started: Callable[[Container], None]) -> int:
    """Carry the streams of one that has just been started, also while hooks are run before anybody hears that it was;
    returns its exit status. Raises KatapodError, why its sandbox died."""
    work = follow(container, streams.stdin, streams.stdout, streams.stderr)
    try:
        async with beside(work, name="carry", may_fail=True) as carrying:
            await container.hooks.started(container.sandbox.vm.pid)
            on_started(container)
            with span("carry its streams"):
                return await carrying
    except BrokenPipeError:
        # nobody reads our output: end as any local process would, by SIGPIPE
        with contextlib.suppress(KatapodError):
            await container.kill(signal.SIGKILL)
        container.save(state=State.STOPPED, exit_code=SIGPIPE_STATUS, finished_at=time.time())
        return SIGPIPE_STATUS


def _with_log(sandbox: Sandbox, streams: Streams, files: contextlib.ExitStack) -> tuple[Sink, Sink]:
    if not streams.keep_log:
        return streams.stdout, streams.stderr
    sink = BoundedLog(sandbox.paths.container_log, streams.log_bytes)
    files.callback(sink.close)

    def tell(problem: str) -> None:
        log.warning("%s", problem)
        with contextlib.suppress(KatapodError):
            sandbox.save(log_error=problem)

    return (
        TeeSink(streams.stdout, LogSink(sink, "stdout", tell)),
        TeeSink(streams.stderr, LogSink(sink, "stderr", tell)),
    )


async def _stop_when_asked(stop: asyncio.Event, container: Container) -> None:
    """The stop signal, a wait, SIGKILL."""
    await stop.wait()
    with contextlib.suppress(KatapodError):
        await container.kill(container.plan.stop_signal)
    if container.plan.stop_timeout_s is None:
        return
    await asyncio.sleep(container.plan.stop_timeout_s)
    with contextlib.suppress(KatapodError):
        await container.kill(signal.SIGKILL)
