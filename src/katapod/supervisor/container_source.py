"""What a container is made of: of an image, which is brought in first, a directory or an OCI bundle."""

import contextlib
import logging
import os
import signal
from collections.abc import Iterable
from pathlib import Path

from msgspec.structs import replace

from katapod.host.trace import span
from katapod.images import ImageStore
from katapod.model import oci
from katapod.model.attachment import AttachmentRecord
from katapod.model.config import Config
from katapod.model.errors import KatapodError, NotFound, UsageError
from katapod.model.flags import parse_signal
from katapod.model.image import ImageConfig, ImageRecord
from katapod.plan.container_spec import (
    ContainerOptions,
    ProcessDefaults,
    effective_user,
    plan_container_spec,
    with_etc_files,
)
from katapod.plan.seccomp import GuestKernel, wants_kernel_version
from katapod.sandbox.attachment import container_files
from katapod.sandbox.container import ContainerPlan, Rootfs
from katapod.supervisor.host_devices import with_host_devices
from katapod.supervisor.image_policy import bring_in
from katapod.supervisor.kept import kept_disk
from katapod.supervisor.named_volumes import fill_volumes
from katapod.supervisor.run_context import RunContext
from katapod.supervisor.run_request import RunRequest

__all__ = ["prepare_container", "with_network_files"]

log = logging.getLogger(__name__)


async def prepare_container(
    context: RunContext, config: Config, request: RunRequest, bundle_spec: oci.Spec | None
) -> ContainerPlan:
    """Find what the request names; an image is held for the sandbox from then on. `bundle_spec`: of the bundle, if that
    is asked for.

    Raises NotFound, UsageError, and as ImageStore.acquire.
    """
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
            stop_timeout_s=request.stop_timeout_s,
            guest_seccomp=seccomp,
            create_timeout_s=timeout_s,
            bundle=request.bundle,
        )
    has_files, disk = kept_disk(context.layout, request.container_id) if request.again else (False, None)
    if request.rootfs is not None:
        _check_rootfs(request.rootfs)
        defaults, digest, rootfs = ProcessDefaults(), "", Rootfs(request.rootfs, kept=request.lasts)
    else:
        store = context.image_store()
        progressing = contextlib.nullcontext() if request.image_policy.quiet else context.image_progress()
        with progressing as progress:
            found = await bring_in(store, request, progress, config.katapod.registries)
        defaults = _defaults_of(found.config)
        if not has_files:
            disk = await _root_disk(store, found) if config.katapod.rootfs == "disk" else None
        digest, rootfs = found.digest, Rootfs(store.rootfs_path(found.digest), kept=request.lasts, disk=disk)
    user = effective_user(defaults, request.options)
    spec = plan_container_spec(defaults, request.options, str(rootfs.lower), _guest_kernel(config, request.options))
    spec = with_host_devices(spec, request.options)
    _check_sources(spec)
    if not has_files:
        await fill_volumes(context.layout, request, rootfs.lower)
    names = ("hostname",) if request.network.no_hosts else ("hostname", "hosts")
    directory = str(context.layout.sandbox(request.sandbox_id).etc(request.container_id))
    return ContainerPlan(
        container_id=request.container_id,
        image=request.image or str(request.rootfs),
        image_digest=digest,
        spec=with_etc_files(spec, directory, _files_of_etc(rootfs.lower, names)),
        rootfs=rootfs,
        user=f"{user.user}:{user.group}" if user.group else user.user,
        groups=request.options.groups,
        stop_signal=request.stop_signal or _image_signal(defaults.stop_signal),
        stop_timeout_s=request.stop_timeout_s,
        volumes=tuple(each.name for each in request.options.named_volumes),
        guest_seccomp=seccomp,
        create_timeout_s=timeout_s,
    )


def _defaults_of(image: ImageConfig) -> ProcessDefaults:
    return ProcessDefaults(
        entrypoint=image.entrypoint,
        cmd=image.cmd,
        env=image.env,
        cwd=image.working_dir,
        user=image.user,
        stop_signal=image.stop_signal,
        labels=image.labels,
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
        log.warning("the image's StopSignal %r is not a signal: the container is stopped by SIGTERM", name[:64])
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


def with_network_files(
    context: RunContext, request: RunRequest, container: ContainerPlan, network: AttachmentRecord | None
) -> ContainerPlan:
    """The container's files of /etc know its address. A bundle has files of its own."""
    if container.rootfs.direct:
        return container
    etc = container_files(container.spec.hostname, request.network, network)
    directory = str(context.layout.sandbox(request.sandbox_id).etc(request.container_id))
    more = [name for name in etc if name == "resolv.conf"]  # the others are mounted already
    more = _files_of_etc(container.rootfs.lower, more)
    return replace(container, etc=etc, spec=with_etc_files(container.spec, directory, more))
