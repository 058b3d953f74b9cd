"""Own one container in one sandbox, from its start to its end: what `run` does, attached or in the background."""

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from katapod.host.logs import BoundedLog
from katapod.host.state import StateStore
from katapod.host.tasks import finish
from katapod.host.trace import span
from katapod.model import oci
from katapod.model.attachment import AttachmentRecord
from katapod.model.devices import DeviceTable
from katapod.model.errors import KatapodError
from katapod.model.mount_options import Access, parse_access
from katapod.model.record import SandboxRecord, State
from katapod.sandbox.container import Container, ContainerPlan, create_container, watch_oom
from katapod.sandbox.control import control_socket
from katapod.sandbox.lifecycle import Sandbox, start_sandbox
from katapod.sandbox.management_door import management_door
from katapod.sandbox.planning import SandboxPlan
from katapod.sandbox.pool import ReadyMachine
from katapod.sandbox.recovery import release_kept, remove_sandbox
from katapod.sandbox.rootfs import root_disk_of
from katapod.sandbox.start_record import Attaching
from katapod.sandbox.stdio import InputFd, LogSink, NullSink, Sink, TeeSink

__all__ = ["Outcome", "Streams", "claimed", "run_container"]

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


@contextlib.asynccontextmanager
async def claimed(store: StateStore, record: SandboxRecord) -> AsyncIterator[None]:
    """Take the sandbox's id, and own it while the block runs; the first thing written, the last removed.

    If the block fails before the sandbox kept a record of its own (run_container), all is removed.
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


async def run_container(
    plan: SandboxPlan,
    container_plan: ContainerPlan,
    store: StateStore,
    streams: Streams,
    *,
    on_started: Callable[[Container], None] = lambda container: None,
    ready: ReadyMachine | None = None,
    attaching: Attaching | None = None,
    with_network: Callable[[ContainerPlan, AttachmentRecord | None], ContainerPlan] = lambda plan, network: plan,
) -> Outcome:
    """Run a container to its end, inside `claimed`.

    `with_network` completes its plan by what `attaching` has brought, once the sandbox is open.

    Whatever happens nothing of the VM stays; with auto_remove nothing at all does, and without it the
    record (with exit code or error) and the log do, once the container has run. A cancelled start is as
    if it had never been.
    """
    paths = store.layout.sandbox(plan.record.sandbox_id)
    root_disk = root_disk_of(paths, container_plan.container_id, container_plan.rootfs)
    sandbox = await start_sandbox(replace(plan, root_disk=root_disk), store, ready, attaching)
    keep = False
    try:
        container_plan = with_network(container_plan, sandbox.record.attachment)
        with span("create container"):
            container = await create_container(sandbox, container_plan)
        await sandbox.wait_grown()  # before its first instruction
        outcome = await _run_started(sandbox, container, streams, on_started)
        keep = not plan.record.auto_remove
    except BaseException as exc:
        keep = not plan.record.auto_remove and any(item.started_at for item in sandbox.record.containers)
        if keep:
            _record_error(sandbox, exc)
        raise
    finally:
        expendable = not _writes_to_host(container_plan, sandbox.paths.data)
        await finish(_close(sandbox, store, keep=keep, expendable=expendable), name="close")
    return outcome


def _writes_to_host(plan: ContainerPlan, own: Path) -> bool:
    """Whether anything that the container can write outlives it; what lies below `own` does not."""
    return plan.rootfs.direct or any(
        oci.is_of_host(mount)
        and parse_access(mount.options) is not Access.READ_ONLY
        and not Path(mount.source).is_relative_to(own)
        for mount in plan.spec.mounts
    )


async def _close(sandbox: Sandbox, store: StateStore, *, keep: bool, expendable: bool) -> None:
    try:
        with span("close"):
            await sandbox.close(expendable=expendable)
    finally:
        if keep:
            sandbox.save(state=State.STOPPED, vmm_pid=0, devices=DeviceTable())
            await release_kept(store, sandbox.sandbox_id)
        else:
            await remove_sandbox(store, sandbox.sandbox_id)


def _record_error(sandbox: Sandbox, exc: BaseException) -> None:
    text = str(exc) if isinstance(exc, KatapodError) else "it was stopped by a signal"
    containers = tuple(
        item
        if item.state is State.STOPPED
        else msgspec.structs.replace(item, state=State.STOPPED, error=text, exit_code=137, finished_at=time.time())
        for item in sandbox.record.containers
    )
    sandbox.save(error=text, containers=containers)


async def _run_started(
    sandbox: Sandbox, container: Container, streams: Streams, on_started: Callable[[Container], None]
) -> Outcome:
    oom = asyncio.Event()
    watcher = asyncio.create_task(watch_oom({container.container_id: oom}, sandbox.agent), name="watch-oom")
    stop = asyncio.Event()
    stopper = asyncio.create_task(_stop_when_asked(stop, container), name="stopper")
    try:
        async with management_door(sandbox), control_socket(sandbox.paths, lambda: [container], stop.set):
            with contextlib.ExitStack() as files:
                stdout, stderr = _with_log(sandbox, streams, files)
                with span("start container"):
                    await container.start()
                on_started(container)
                try:
                    with span("carry its streams"):
                        code = await container.carry(streams.stdin, stdout, stderr)
                except BrokenPipeError:
                    # nobody reads our output: end as any local process would, by SIGPIPE
                    with contextlib.suppress(KatapodError):
                        await container.kill(signal.SIGKILL)
                    container.save(state=State.STOPPED, exit_code=SIGPIPE_STATUS, finished_at=time.time())
                    code = SIGPIPE_STATUS
            if code == 128 + signal.SIGKILL and not oom.is_set():
                # the event travels beside the exit status: give it a moment
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.3):
                        await oom.wait()
            if oom.is_set():
                container.save(oom_killed=True)
            return Outcome(code, oom_killed=oom.is_set())
    finally:
        for task in (watcher, stopper):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


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
