"""The process that owns a sandbox while it lives: this one (attached) or a child in the background."""

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec

from katapod.host.own_mounts import leave_host_mounts
from katapod.host.trace import span
from katapod.model import oci
from katapod.model.config import Config
from katapod.model.errors import KatapodError
from katapod.model.sizing import ContainerLimits
from katapod.plan.cgroup import path_without_engine
from katapod.plan.container_spec import ContainerOptions
from katapod.sandbox.bundle import read_bundle
from katapod.sandbox.container import Container, ContainerPlan
from katapod.sandbox.errors import CommandNotExecutable, CommandNotFound
from katapod.sandbox.pool import ReadyMachine
from katapod.sandbox.request import SandboxRequest
from katapod.sandbox.runner import Outcome, Streams, run_container
from katapod.sandbox.stdio import InputFd, OutputFd
from katapod.supervisor.container_source import prepare_container, with_network_files
from katapod.supervisor.run_context import RunContext
from katapod.supervisor.run_request import RunRequest
from katapod.supervisor.terminal import follow_size, raw_terminal

__all__ = ["ENDING", "FORWARDED", "cancel_once", "own_container", "run_attached", "run_detached"]

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


async def run_attached(context: RunContext, request: RunRequest, ready: ReadyMachine | None = None) -> int:
    """Run in the foreground, in the machine `ready` if that fits; returns the exit status."""
    streams = Streams(
        stdin=InputFd(0) if request.interactive else None,
        stdout=OutputFd(1),
        stderr=OutputFd(2),
        keep_log=not request.remove,
    )
    container: list[Container] = []
    task = asyncio.create_task(own_container(context, request, streams, container.append, ready), name="run")
    caught: list[signal.Signals] = []
    loop = asyncio.get_running_loop()
    sending: set[asyncio.Task[None]] = set()

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
        sent = asyncio.create_task(_forward(container[0], signal.SIGKILL if requests > 1 else number), name="forward")
        sending.add(sent)
        sent.add_done_callback(sending.discard)

    for number in FORWARDED:
        loop.add_signal_handler(number, on_signal, number)
    try:
        outcome = await task
    except asyncio.CancelledError:
        if caught:
            return 128 + caught[0]
        raise
    return _report(context, request, outcome)


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
        context.tell(f"{request.container_id} was killed: out of memory{shown}")
    return outcome.exit_code


async def own_container(
    context: RunContext,
    request: RunRequest,
    streams: Streams,
    on_started: Callable[[Container], None],
    ready: ReadyMachine | None = None,
) -> Outcome:
    """The whole way from a request to its outcome."""
    bundle_spec = _load_bundle(request) if request.bundle else None
    with span("load configuration"):
        config = context.load_config(bundle_spec.annotations if bundle_spec else None)
    wanted = SandboxRequest(
        sandbox_id=request.container_id,
        hostname=(bundle_spec or request.options).hostname or request.container_id,
        limits=_limits(request.options, bundle_spec),
        fixed=True,
        network=request.network,
        cgroups_path=_cgroups_path(config, request.container_id, bundle_spec),
        shm_size_bytes=request.options.shm_bytes,
        accelerator=request.accel,
        auto_remove=request.remove,
        labels=request.labels,
    )

    async def prepare() -> ContainerPlan:
        with span("acquire image"):
            return await prepare_container(context, config, request, bundle_spec)

    with contextlib.ExitStack() as terminal:
        return await run_container(
            wanted,
            config,
            context.states(),
            streams,
            prepare,
            on_started=_take_terminal(request, terminal, on_started),
            ready=ready,
            with_network=partial(with_network_files, context, request),
            tell=context.tell,
        )


def _cgroups_path(config: Config, container_id: str, bundle_spec: oci.Spec | None) -> str | None:
    """With sandbox_cgroup_only=false the cgroups are those of a pod, from whose limits they keep a VM's own threads:
    here nobody has set such limits."""
    if not config.runtime.sandbox_cgroup_only:
        return None
    return path_without_engine(container_id, bundle_spec.linux.cgroups_path if bundle_spec is not None else "")


def _take_terminal(
    request: RunRequest,
    stack: contextlib.ExitStack,
    on_started: Callable[[Container], None],
) -> Callable[[Container], None]:
    """Wrap `on_started` so that a started container with a terminal gets ours, until `stack` is closed."""
    if not os.isatty(0):
        return on_started

    def started(running: Container) -> None:
        on_started(running)
        if not running.plan.spec.process.terminal:
            return
        if request.interactive:
            stack.enter_context(raw_terminal(0))
        stack.enter_context(follow_size(running.process, 0))

    return started


def _limits(options: ContainerOptions, bundle_spec: oci.Spec | None) -> ContainerLimits:
    if bundle_spec is None:
        return ContainerLimits(memory_bytes=options.memory_bytes, cpus=options.cpus)
    return ContainerLimits(memory_bytes=bundle_spec.memory_limit, cpus=bundle_spec.cpu_limit)


def _load_bundle(request: RunRequest) -> oci.Spec:
    assert request.bundle is not None
    spec = read_bundle(request.bundle)
    return msgspec.structs.replace(
        spec,
        process=msgspec.structs.replace(
            spec.process,
            terminal=spec.process.terminal or request.options.tty,
            console_size=request.options.console_size,
        ),
    )


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
    if not report:
        os.waitpid(pid, 0)
        raise KatapodError("cannot start the container: the process in the background was killed")
    answer = json.loads(report)
    if "error" in answer:
        os.waitpid(pid, 0)
        kind = {127: CommandNotFound, 126: CommandNotExecutable}.get(answer["code"], KatapodError)
        raise kind(answer["error"], hint=answer["hint"])
    return 0


def _background(context: RunContext, request: RunRequest, writer: int) -> int:
    """The child: a session of its own; standard error stays the caller's until the container runs."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)

    def tell(message: dict[str, object]) -> None:
        with contextlib.suppress(OSError):
            os.write(writer, json.dumps(message).encode())

    def started(container: Container) -> None:
        tell({"id": request.container_id})
        os.close(writer)
        os.dup2(null, 2)

    async def own() -> None:
        task = asyncio.create_task(own_container(context, request, Streams(), started), name="run")
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
        hint = exc.hint if isinstance(exc, KatapodError) else ""
        code = exc.exit_code if isinstance(exc, KatapodError) else 125
        tell({"error": str(exc) or repr(exc), "hint": hint, "code": code})
        return 1
    return 0
