"""The process that owns a sandbox while it lives: this one (attached) or a child in the background."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from katapod.cli.progress import image_progress
from katapod.cli.run_request import RunRequest
from katapod.cli.settings import Globals
from katapod.cli.terminal import follow_size, raw_terminal
from katapod.host.facts import collect_host_facts, virtiofsd_dialect
from katapod.host.own_mounts import leave_host_mounts
from katapod.host.trace import span
from katapod.images import ImageStore
from katapod.model import oci
from katapod.model.attachment import AttachmentRecord
from katapod.model.config import Config
from katapod.model.errors import KatapodError, NotFound, UsageError
from katapod.model.flags import parse_signal
from katapod.model.image import ImageRecord
from katapod.model.record import SandboxRecord
from katapod.model.sizing import ContainerLimits
from katapod.plan.container_spec import (
    ContainerOptions,
    ProcessDefaults,
    effective_user,
    plan_container_spec,
    with_etc_files,
)
from katapod.plan.seccomp import GuestKernel, wants_kernel_version
from katapod.sandbox.attachment import attached, container_files, plan_attachment
from katapod.sandbox.bundle import read_bundle
from katapod.sandbox.container import Container, ContainerPlan, Rootfs
from katapod.sandbox.errors import CommandNotExecutable, CommandNotFound
from katapod.sandbox.planning import plan_sandbox, size_for
from katapod.sandbox.pool import ReadyMachine
from katapod.sandbox.proof import accelerator_for
from katapod.sandbox.recovery import reap_dead
from katapod.sandbox.runner import Outcome, Streams, claimed, run_container
from katapod.sandbox.stdio import InputFd, OutputFd

__all__ = ["ENDING", "RunRequest", "cancel_once", "own_container", "plan_container", "run_attached", "run_detached"]

log = logging.getLogger(__name__)

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


async def run_attached(settings: Globals, request: RunRequest, ready: ReadyMachine | None = None) -> int:
    """Run in the foreground, in the machine `ready` if that fits; returns the exit status."""
    streams = Streams(
        stdin=InputFd(0) if request.interactive else None,
        stdout=OutputFd(1),
        stderr=OutputFd(2),
        keep_log=not request.remove,
    )
    container: list[Container] = []
    task = asyncio.create_task(own_container(settings, request, streams, container.append, ready), name="run")
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
    return _report(request, outcome)


def cancel_once(task: "asyncio.Task[Any]") -> None:
    """A further signal must not break off the clean-up that the first one began."""
    if not task.cancelling():
        task.cancel()


async def _forward(container: Container, number: int) -> None:
    with contextlib.suppress(KatapodError):
        await container.kill(number)


def _report(request: RunRequest, outcome: Outcome) -> int:
    if outcome.oom_killed:
        limit = request.options.memory_bytes
        shown = f" (its limit: {limit >> 20} MiB)" if limit else ""
        print(f"kata-runtime: {request.container_id} was killed: out of memory{shown}", file=sys.stderr)
    return outcome.exit_code


async def own_container(
    settings: Globals,
    request: RunRequest,
    streams: Streams,
    on_started: Callable[[Container], None],
    ready: ReadyMachine | None = None,
) -> Outcome:
    """The whole way from a request to its outcome."""
    bundle_spec = _load_bundle(request) if request.bundle else None
    with span("load configuration"):
        config = settings.load_config(annotations=bundle_spec.annotations if bundle_spec else None)
        facts, store = collect_host_facts(), settings.states()
    size = size_for(config, facts, (_limits(request.options, bundle_spec),))
    for told in size.clamped:
        print(f"kata-runtime: WARNING: {request.container_id}: {told}", file=sys.stderr)
    with span("look for dead owners"):
        await reap_dead(store)
    with contextlib.ExitStack() as held:
        network = await plan_attachment(request.network, config.katapod, request.container_id, held)
        record = SandboxRecord(
            sandbox_id=request.container_id,
            created_at=time.time(),
            owner_pid=os.getpid(),
            boot_id=facts.boot_id,
            auto_remove=request.remove,
            attachment=network,
            labels=request.labels,
        )
        async with claimed(store, record), contextlib.AsyncExitStack() as stack:
            attaching = await stack.enter_async_context(attached(network, request.container_id)) if network else None
            dialect = asyncio.create_task(virtiofsd_dialect(config.qemu.virtio_fs_daemon), name="dialect")
            with span("acquire image"):
                container = await plan_container(settings, config, request, bundle_spec)
            verdict = await accelerator_for(config, facts, store.layout, request.container_id, request.accel)
            if verdict.fresh:
                print(f"kata-runtime: {verdict.describe()}", file=sys.stderr)
            plan = plan_sandbox(
                request.container_id,
                config,
                facts,
                store.layout,
                accelerator=verdict.accelerator,
                remedy=verdict.remedy,
                proof_key=verdict.key,
                dialect=await dialect,
                size=size,
                owner_pid=os.getpid(),
                hostname=container.spec.hostname or request.container_id,
                shm_size_bytes=request.options.shm_bytes,
                auto_remove=request.remove,
                labels=request.labels,
                netns=Path(network.netns) if network is not None else None,
                attached_to=network.config if network is not None else None,
            )
            plan = replace(plan, record=msgspec.structs.replace(plan.record, attachment=network))
            with contextlib.ExitStack() as terminal:
                with_terminal = _take_terminal(request, container, terminal, on_started)
                return await run_container(
                    plan,
                    container,
                    store,
                    streams,
                    on_started=with_terminal,
                    ready=ready,
                    attaching=attaching,
                    with_network=partial(_with_network_files, settings, request),
                )


def _with_network_files(
    settings: Globals, request: RunRequest, container: ContainerPlan, network: AttachmentRecord | None
) -> ContainerPlan:
    """The container's files of /etc know its address. A bundle has files of its own."""
    if container.rootfs.direct:
        return container
    etc = container_files(container.spec.hostname, request.network, network)
    directory = str(settings.layout.sandbox(request.container_id).etc(request.container_id))
    more = [name for name in etc if name == "resolv.conf"]  # the others are mounted already
    more = _files_of_etc(container.rootfs.lower, more)
    return replace(container, etc=etc, spec=with_etc_files(container.spec, directory, more))


def _take_terminal(
    request: RunRequest,
    container: ContainerPlan,
    stack: contextlib.ExitStack,
    on_started: Callable[[Container], None],
) -> Callable[[Container], None]:
    """Wrap `on_started` so that a started container with a terminal gets ours, until `stack` is closed."""
    if not container.spec.process.terminal or not os.isatty(0):
        return on_started

    def started(running: Container) -> None:
        on_started(running)
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


async def plan_container(
    settings: Globals, config: Config, request: RunRequest, bundle_spec: oci.Spec | None
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
        )
    if request.rootfs is not None:
        _check_rootfs(request.rootfs)
        defaults, digest, rootfs = ProcessDefaults(), "", Rootfs(request.rootfs)
    else:
        store = settings.image_store()
        with image_progress() as progress:
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
    directory = str(settings.layout.sandbox(request.container_id).etc(request.container_id))
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


def run_detached(settings: Globals, request: RunRequest) -> int:
    """Run in a child that goes on when we have ended; returns once the container runs, or raises its error."""
    reader, writer = os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # until both sides have handlers
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        os._exit(_background(settings, request, writer))
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
    print(request.container_id)
    return 0


def _background(settings: Globals, request: RunRequest, writer: int) -> int:
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
        task = asyncio.create_task(own_container(settings, request, Streams(), started), name="run")
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
