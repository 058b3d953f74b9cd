"""The process that owns a sandbox while it lives: this one (attached) or a child in the background."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable
from typing import Any

from katapod.host.own_mounts import leave_host_mounts
from katapod.model.errors import KatapodError
from katapod.model.exit_status import KILLED_STATUS
from katapod.sandbox.container import Container
from katapod.sandbox.pool import ReadyMachine
from katapod.sandbox.runner import Outcome, Streams, run_container
from katapod.sandbox.stdio import InputFd, NullSink, OutputFd
from katapod.supervisor.background_report import expect_started, tell, tell_error
from katapod.supervisor.restarting import Backoff, next_run
from katapod.supervisor.run_context import RunContext
from katapod.supervisor.run_request import RunRequest
from katapod.supervisor.start import created
from katapod.supervisor.terminal import follow_size, raw_terminal
from katapod.tasks import Background, beside

__all__ = ["ENDING", "FORWARDED", "background_streams", "cancel_once", "own_container", "run_attached", "run_detached"]

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


async def run_attached(context: RunContext, request: RunRequest, ready: ReadyMachine | None = None) -> int:
    """Run in the foreground, in the machine `ready` if that fits; returns the exit status."""
    container: list[Container] = []  # that which runs now, if any
    caught: list[signal.Signals] = []

    def on_signal(number: signal.Signals) -> None:
        caught.append(number)
        if not container:
            cancel_once(task)  # the start is undone
            return
        # A second request to end is meant seriously: the container's init may ignore what it does not handle.
        # A third does not count on the guest any more.
        requests = sum(item in ENDING for item in caught) if number in ENDING else 0
        if requests > 2:
            cancel_once(task)
            return
        if requests:
            container[0].note_stop_asked()
        background.start(_forward(container[0], signal.SIGKILL if requests > 1 else number), name="forward")

    work = own_container(context, request, _own_streams, container.append, ready, container.clear)
    async with Background() as background, beside(work, name="run") as task:
        for number in FORWARDED:
            asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
        try:
            outcome = await task
        except asyncio.CancelledError:
            if caught:
                return 128 + caught[0]
            raise
    return _report(context, request, outcome)


def _own_streams(request: RunRequest) -> Streams:
    return Streams(
        stdin=InputFd(0) if request.interactive and "stdin" in request.attach else None,
        stdout=OutputFd(1) if "stdout" in request.attach else NullSink(),
        stderr=OutputFd(2) if "stderr" in request.attach else NullSink(),
        keep_log=request.log.keep and not request.remove,
        log_bytes=request.log.size_bytes,
    )


def cancel_once(task: "asyncio.Task[Any]") -> None:
    """A further signal must not break off the clean-up that the first one began."""
    if not task.cancelling():
        task.cancel()


async def _forward(container: Container, number: int) -> None:
    with contextlib.suppress(KatapodError):
        await container.kill(number)


def _report(context: RunContext, request: RunRequest, outcome: Outcome) -> int:
    if outcome.oom_killed:
        limit = request.options.memory_bytes
        shown = f" (its limit: {limit >> 20} MiB)" if limit else ""
        # A limit kills one process; the container's own goes on, or ends as it likes, if that was a child of it.
        killed = "was killed" if outcome.exit_code == 128 + signal.SIGKILL else "lost a process, which was killed"
        context.tell(f"{request.container_id} {killed}: out of memory{shown}")
    return outcome.exit_code


async def own_container(
    context: RunContext,
    request: RunRequest,
    streams: Callable[[RunRequest], Streams],
    on_started: Callable[[Container], None],
    ready: ReadyMachine | None = None,
    on_ended: Callable[[], None] = lambda: None,
) -> Outcome:
    """The whole way from a request to its outcome: the last one, if it has a restart policy. `streams` are opened, and
    `on_started` and `on_ended` hear, for each run. Raises why the container could not be started, or why its sandbox
    died."""
    backoff, store = Backoff(), context.states()
    while True:
        began: list[float] = []

        def started(container: Container, began: list[float] = began) -> None:
            began.append(time.monotonic())
            on_started(container)

        failure = None
        try:
            outcome = await _run_once(context, request, streams(request), started, ready)
        except KatapodError as exc:
            if not began:
                raise
            failure, outcome = exc, Outcome(KILLED_STATUS)
        on_ended()
        again = None
        if request.restart.name != "no":
            delay_s = backoff.after(time.monotonic() - began[0] if began else 0.0)
            again = await next_run(store, request, outcome.exit_code, delay_s)
        if again is None:
            if failure is not None:
                raise failure
            return outcome
        request, ready = again, None


async def _run_once(
    context: RunContext,
    request: RunRequest,
    streams: Streams,
    on_started: Callable[[Container], None],
    ready: ReadyMachine | None,
) -> Outcome:
    async with Background() as background:
        with contextlib.ExitStack() as terminal:
            return await run_container(
                created(context, request, ready),
                streams,
                on_started=_take_terminal(request, terminal, background, on_started),
            )


def _take_terminal(
    request: RunRequest,
    stack: contextlib.ExitStack,
    background: Background,
    on_started: Callable[[Container], None],
) -> Callable[[Container], None]:
    """Wrap `on_started` so that a started container with a terminal gets ours, until `stack` is closed; `background`
    is closed after it."""
    if not os.isatty(0):
        return on_started

    def started(running: Container) -> None:
        on_started(running)
        if not running.plan.spec.process.terminal:
            return
        if request.interactive:
            stack.enter_context(raw_terminal(0))
        stack.enter_context(follow_size(running.process, 0, background))

    return started


def background_streams(request: RunRequest) -> Streams:
    """Of a container that nobody is attached to."""
    return Streams(keep_log=request.log.keep, log_bytes=request.log.size_bytes)


def run_detached(context: RunContext, request: RunRequest) -> int:
    """Run in a child that goes on when we have ended; returns once the container runs, or raises its error.

    The status is 0, or says which signal has ended the start.
    """
    reader, writer = os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # until both sides have handlers
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        os._exit(_background(context, request, writer))
    os.close(writer)
    caught: list[int] = []

    def stop(number: int, frame: object) -> None:
        caught.append(number)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)

    for number in ENDING:
        signal.signal(number, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    with os.fdopen(reader, "rb") as handle:
        report = handle.read()
    if caught:
        os.waitpid(pid, 0)
        return 128 + caught[0]
    expect_started(report, pid, "start the container")
    return 0


def _background(context: RunContext, request: RunRequest, writer: int) -> int:
    """The child: a session of its own; standard error stays the caller's until the container runs."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    told: list[str] = []

    def started(container: Container) -> None:
        if told:  # its policy has started it again
            return
        told.append(container.container_id)
        tell(writer, {"id": request.container_id})
        os.close(writer)
        os.dup2(null, 2)

    async def own() -> None:
        async with beside(own_container(context, request, background_streams, started), name="run") as task:
            loop = asyncio.get_running_loop()
            for number in ENDING:
                loop.add_signal_handler(number, cancel_once, task)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
            await task

    try:
        leave_host_mounts()
        asyncio.run(own())
    except asyncio.CancelledError:
        return 143
    except BaseException as exc:
        if not told:
            tell_error(writer, exc)
        return 1
    return 0
