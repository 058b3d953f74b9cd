"""The process that owns a sandbox while it lives: this one (attached) or a child in the background."""

import asyncio
import contextlib
import json
import logging
import os
import signal
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from katapod.host.own_mounts import leave_host_mounts
from katapod.host.trace import span
from katapod.images import ImageStore
from katapod.model import oci
from katapod.model.attachment import AttachmentRecord
from katapod.model.config import Config
from katapod.model.errors import KatapodError, NotFound, UsageError
from katapod.model.flags import parse_signal
from katapod.model.image import ImageRecord
from katapod.model.sizing import ContainerLimits
from katapod.plan.cgroup import path_without_engine
from katapod.plan.container_spec import (
    ContainerOptions,
    ProcessDefaults,
    effective_user,
    plan_container_spec,
    with_etc_files,
)
from katapod.plan.seccomp import GuestKernel, wants_kernel_version
from katapod.sandbox.attachment import container_files
from katapod.sandbox.bundle import read_bundle
from katapod.sandbox.container import Container, ContainerPlan, Rootfs
from katapod.sandbox.errors import CommandNotExecutable, CommandNotFound
from katapod.sandbox.pool import ReadyMachine
from katapod.sandbox.request import SandboxRequest
from katapod.sandbox.runner import Outcome, Streams, run_container
from katapod.sandbox.stdio import InputFd, OutputFd
from katapod.supervisor.run_context import RunContext
from katapod.supervisor.run_request import RunRequest
from katapod.supervisor.terminal import follow_size, raw_terminal

__all__ = ["ENDING", "RunRequest", "cancel_once", "own_container", "prepare_container", "run_attached", "run_detached"]

log = logging.getLogger(__name__)

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
            with_network=partial(_with_network_files, context, request),
            tell=context.tell,
        )


def _cgroups_path(config: Config, container_id: str, bundle_spec: oci.Spec | None) -> str | None:
    """With sandbox_cgroup_only=false the cgroups are those of a pod, from whose limits they keep a VM's own threads:
    here nobody has set such limits."""
    if not config.runtime.sandbox_cgroup_only:
        return None
    return path_without_engine(container_id, bundle_spec.linux.cgroups_path if bundle_spec is not None else "")


def _with_network_files(
    context: RunContext, request: RunRequest, container: ContainerPlan, network: AttachmentRecord | None
) -> ContainerPlan:
    """The container's files of /etc know its address. A bundle has files of its own."""
    if container.rootfs.direct:
        return container
    etc = container_files(container.spec.hostname, request.network, network)
    directory = str(context.layout.sandbox(request.container_id).etc(request.container_id))
    more = [name for name in etc if name == "resolv.conf"]  # the others are mounted already
    more = _files_of_etc(container.rootfs.lower, more)
    return replace(container, etc=etc, spec=with_etc_files(container.spec, directory, more))


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


async def prepare_container(
    context: RunContext, config: Config, request: RunRequest, bundle_spec: oci.Spec | None
) -> ContainerPlan:
    seccomp, timeout_s = not config.runtime.disable_guest_seccomp, float(config.runtime.create_container_timeout)
    if bundle_spec is not None:
        root = Path(bundle_spec.root.path)
        _check_rootfs(root)
        _check_sources(bundle_spec)
        return ContainerPlan(
            container_id=request.container_id,
            image=str(request.bundle),
            spec=bundle_spec,
            rootfs=Rootfs(root, direct=True),
            stop_signal=request.stop_signal or signal.SIGTERM,
            guest_seccomp=seccomp,
            create_timeout_s=timeout_s,
            bundle=request.bundle,
        )
    if request.rootfs is not None:
        _check_rootfs(request.rootfs)
        defaults, digest, rootfs = ProcessDefaults(), "", Rootfs(request.rootfs)
    else:
        store = context.image_store()
        with context.image_progress() as progress:
            found = await store.acquire(request.image, request.container_id, progress=progress)
        image = found.config
        defaults = ProcessDefaults(
            entrypoint=image.entrypoint,
            cmd=image.cmd,
            env=image.env,
            cwd=image.working_dir,
            user=image.user,
            stop_signal=image.stop_signal,
            labels=image.labels,
        )
        disk = await _root_disk(store, found) if config.katapod.rootfs == "disk" else None
        digest, rootfs = found.digest, Rootfs(store.rootfs_path(found.digest), disk=disk)
    user = effective_user(defaults, request.options)
    spec = plan_container_spec(defaults, request.options, str(rootfs.lower), _guest_kernel(config, request.options))
    _check_sources(spec)
    directory = str(context.layout.sandbox(request.container_id).etc(request.container_id))
    return ContainerPlan(
        container_id=request.container_id,
        image=request.image or str(request.rootfs),
        image_digest=digest,
        spec=with_etc_files(spec, directory, _files_of_etc(rootfs.lower, ("hostname", "hosts"))),
        rootfs=rootfs,
        user=f"{user.user}:{user.group}" if user.group else user.user,
        groups=request.options.groups,
        stop_signal=request.stop_signal or _image_signal(defaults.stop_signal),
        guest_seccomp=seccomp,
        create_timeout_s=timeout_s,
    )


def _guest_kernel(config: Config, options: ContainerOptions) -> GuestKernel | None:
    """For the seccomp profile, if there is one."""
    if options.seccomp is None:
        return None
    if config.runtime.disable_guest_seccomp:
        raise UsageError(
            "cannot apply a seccomp profile: disable_guest_seccomp is set in configuration.toml",
            hint="leave out --security-opt seccomp=..., or set disable_guest_seccomp = false",
        )
    release = ""
    if wants_kernel_version(options.seccomp):
        from katapod.osbuilder.kernel import kernel_release

        with contextlib.suppress(OSError):
            release = kernel_release(Path(config.qemu.kernel))
    return GuestKernel(os.uname().machine, release)


def _image_signal(name: str) -> int:
    """What the image asks for; SIGTERM, as in Docker, where that is no signal."""
    if not name:
        return signal.SIGTERM
    try:
        return parse_signal(name)
    except UsageError:
        log.warning("the image's StopSignal %r is no signal: the container is stopped by SIGTERM", name[:64])
        return signal.SIGTERM


def _files_of_etc(root: Path, names: Iterable[str]) -> list[str]:
    """Those of the names in the image's /etc on which a file can be mounted: an image may have a directory there."""
    found = []
    for name in names:
        place = root / "etc" / name
        if not (root / "etc").is_symlink() and not place.is_symlink() and place.is_dir():
            log.warning("the image's /etc/%s is a directory, and stays as it is", name)
        else:
            found.append(name)
    return found


async def _root_disk(store: ImageStore, image: ImageRecord) -> Path | None:
    """The image as a disk; None, with a warning, where none can be made: virtio-fs does without."""
    try:
        with span("root disk of the image"):
            return await store.root_disk(image)
    except KatapodError as exc:
        hint = exc.hint or 'to do without a disk, set rootfs = "virtio-fs" in [katapod] of configuration.toml'
        log.warning("the root file system is shared by virtio-fs, which is slower: %s (%s)", exc, hint)
        return None


def _check_rootfs(path: Path) -> None:
    if not path.is_dir():
        raise NotFound(f"cannot use {path} as root file system: it is not a directory")


def _check_sources(spec: oci.Spec) -> None:
    """What is to be mounted has to be there: said before a VM is started for it."""
    for mount in spec.mounts:
        if oci.is_bind(mount) and not os.path.exists(mount.source):
            raise NotFound(
                f"cannot mount {mount.source} at {mount.destination}: no such file or directory on this host",
                hint="make it first: unlike Docker, Katapod does not",
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
