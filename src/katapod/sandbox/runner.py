"""Own one container in one sandbox, from its start to its end: what `run` does, attached or in the background."""

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from katapod.host.logs import BoundedLog
from katapod.host.state import StateStore
from katapod.host.tasks import beside, finish
from katapod.host.trace import span
from katapod.model import oci
from katapod.model.attachment import AttachmentRecord
from katapod.model.config import Config
from katapod.model.errors import KatapodError
from katapod.model.mount_options import Access, parse_access
from katapod.model.record import State
from katapod.sandbox.container import Container, ContainerPlan
from katapod.sandbox.lifecycle import Sandbox
from katapod.sandbox.opening import open_sandbox
from katapod.sandbox.planning import RootDisk
from katapod.sandbox.pool import ReadyMachine
from katapod.sandbox.request import SandboxRequest
from katapod.sandbox.rootfs import root_disk_of
from katapod.sandbox.stdio import InputFd, LogSink, NullSink, Sink, TeeSink
from katapod.sandbox.task import follow, watch_oom

__all__ = ["Outcome", "Streams", "run_container"]

log = logging.getLogger(__name__)

CONTAINER_LOG_BYTES = 64 * 1024 * 1024
SIGPIPE_STATUS = 128 + signal.SIGPIPE
STOP_GRACE_S = 10.0


@dataclass(frozen=True, slots=True)
class Streams:
    """Where the container's streams lead on this side."""

    stdin: InputFd | None = None
    stdout: Sink = field(default_factory=NullSink)
    stderr: Sink = field(default_factory=NullSink)
    keep_log: bool = True


@dataclass(frozen=True, slots=True)
class Outcome:
    exit_code: int
    oom_killed: bool = False


# long: what differs between those who run a container, each a step that they may leave out
async def run_container(
    request: SandboxRequest,
    config: Config,
    store: StateStore,
    streams: Streams,
    prepare: Callable[[], Awaitable[ContainerPlan]],
    *,
    on_started: Callable[[Container], None] = lambda container: None,
    ready: ReadyMachine | None = None,
    with_network: Callable[[ContainerPlan, AttachmentRecord | None], ContainerPlan] = lambda plan, network: plan,
    tell: Callable[[str], None] = log.warning,
) -> Outcome:
    """Run a container to its end in a sandbox of its own.

    `prepare` finds what it is made of, once its name is taken; `with_network` completes that by what the plugins of its
    network have said, once the sandbox is open. `ready` and `tell` as for open_sandbox.

    Whatever happens nothing of the VM stays; with auto_remove nothing at all does, and without it the
    record (with exit code or error) and the log do, once the container has run. A cancelled start is as
    if it had never been.
    """
    paths = store.layout.sandbox(request.sandbox_id)
    prepared: list[ContainerPlan] = []
    stop = asyncio.Event()

    async def find_disk() -> RootDisk | None:
        plan = await prepare()
        prepared.append(plan)
        return root_disk_of(paths, plan.container_id, plan.rootfs)

    pod = await open_sandbox(request, config, store, ready=ready, root_disk=find_disk, tell=tell, shut_down=stop.set)
    sandbox, plan = pod.sandbox, prepared[0]
    container, keep = None, False
    try:
        plan = with_network(plan, sandbox.record.attachment)
        with span("create container"):
            container = await pod.create_container(plan, None)
        await sandbox.wait_grown()  # before its first instruction
        outcome = await _run_created(container, streams, on_started, stop)
        keep = not request.auto_remove
    except BaseException as exc:
        keep = not request.auto_remove and any(item.started_at for item in sandbox.record.containers)
        if keep:
            _record_error(sandbox, exc)
        raise
    finally:
        try:
            await pod.close(keep=keep, expendable=not _writes_to_host(plan, sandbox.paths.data))
        finally:
            if container is not None:
                await finish(container.hooks.stopped(), name="poststop")
    return outcome


def _writes_to_host(plan: ContainerPlan, own: Path) -> bool:
    """Whether anything that the container can write outlives it; what lies below `own` does not."""
    return plan.rootfs.direct or any(
        oci.is_of_host(mount)
        and parse_access(mount.options) is not Access.READ_ONLY
        and not Path(mount.source).is_relative_to(own)
        for mount in plan.spec.mounts
    )


def _record_error(sandbox: Sandbox, exc: BaseException) -> None:
    text = str(exc) if isinstance(exc, KatapodError) else "it was stopped by a signal"
    containers = tuple(
        item
        if item.state is State.STOPPED
        else msgspec.structs.replace(item, state=State.STOPPED, error=text, exit_code=137, finished_at=time.time())
        for item in sandbox.record.containers
    )
    sandbox.save(error=text, containers=containers)


async def _run_created(
    container: Container, streams: Streams, on_started: Callable[[Container], None], stop: asyncio.Event
) -> Outcome:
    """Start it, follow it to its end, and record that. `stop` asks for its end."""
    sandbox = container.sandbox
    async with (
        beside(watch_oom(sandbox, {container.container_id: container}), name="watch-oom"),
        beside(_stop_when_asked(stop, container), name="stopper"),
    ):
        if container.hooks.set_up_network:
            await sandbox.rescan_network()
        with contextlib.ExitStack() as files:
            stdout, stderr = _with_log(sandbox, streams, files)
            with span("start container"):
                await container.start()
            code = await _carry(container, Streams(streams.stdin, stdout, stderr), on_started)
        return Outcome(code, oom_killed=container.out_of_memory.is_set())


async def _carry(container: Container, streams: Streams, on_started: Callable[[Container], None]) -> int:
    """Carry its streams, also while hooks are run before anybody hears that it was started; returns its exit status."""
    carrying = asyncio.create_task(follow(container, streams.stdin, streams.stdout, streams.stderr), name="carry")
    try:
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
    finally:
        carrying.cancel()
        await asyncio.gather(carrying, return_exceptions=True)


def _with_log(sandbox: Sandbox, streams: Streams, files: contextlib.ExitStack) -> tuple[Sink, Sink]:
    if not streams.keep_log:
        return streams.stdout, streams.stderr
    sink = BoundedLog(sandbox.paths.container_log, CONTAINER_LOG_BYTES)
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
    for number in (container.plan.stop_signal, signal.SIGKILL):
        with contextlib.suppress(KatapodError):
            await container.kill(number)
        await asyncio.sleep(STOP_GRACE_S)
