"""What an engine's bundle asks for: of the sandbox, if its container is the first of one, and of the container itself.

For every entry point that engines come in by. A bundle's spec has been read by read_bundle.
"""

from pathlib import Path

from msgspec.structs import replace

from katapod.host.mounts import shared_memory_size
from katapod.model import oci
from katapod.model.annotations import ContainerKind, PodAnnotations
from katapod.model.config import Config
from katapod.model.errors import UsageError
from katapod.model.flags import parse_size
from katapod.model.ids import parse_container_name, short_id
from katapod.model.layout import SHM
from katapod.model.mount_options import Access, parse_access
from katapod.model.sizing import ContainerLimits
from katapod.plan.container_spec import DEFAULT_SHM_BYTES
from katapod.plan.guest_spec import visible_mounts, without_host_devices
from katapod.sandbox.block_devices import has_block_devices
from katapod.sandbox.container import Container, ContainerPlan, Rootfs
from katapod.sandbox.request import SandboxRequest, wants_32bit

__all__ = ["carried_spec", "container_plan", "limits_of", "netns_of", "sandbox_request", "take_network"]

RESOLV_CONF_MAX = 64 * 1024  # characters


def carried_spec(spec: oci.Spec) -> tuple[oci.Spec, bool]:
    """The spec without what engines write and mean otherwise: mounts that others hide, shared memory on the host, all
    devices of the host; and whether there were such devices."""
    spec = replace(spec, mounts=tuple(_guest_memory(mount) for mount in visible_mounts(spec.mounts)))
    guarded = without_host_devices(spec)
    return guarded, guarded is not spec


def sandbox_request(
    sandbox_id: str, spec: oci.Spec, about: PodAnnotations, *, cgroups_path: str, labels: dict[str, str]
) -> SandboxRequest:
    """The sandbox for its first container. Raises UsageError, SpecError."""
    return SandboxRequest(
        sandbox_id=parse_container_name(sandbox_id),
        hostname=spec.hostname or short_id(sandbox_id),
        limits=limits_of(spec, about),
        announced=about.pod_limits,
        cpus_asked=about.pod_cpus_asked,
        netns=netns_of(spec),
        cgroups_path=cgroups_path,
        dns=_dns_of(spec),
        block_devices=has_block_devices(spec),
        programs_32bit=wants_32bit(spec),
        shm_size_bytes=_shm_size(spec),
        volumes=oci.bind_sources(spec),
        is_pod=about.kind is ContainerKind.SANDBOX,
        labels=labels,
    )


def container_plan(
    container_id: str, spec: oci.Spec, about: PodAnnotations, config: Config, *, bundle: Path, own_rootfs: bool
) -> ContainerPlan:
    """`own_rootfs`: this process has mounted its root file system, and the host does not see it."""
    return ContainerPlan(
        container_id=container_id,
        image=_image_of(spec),
        spec=spec,
        rootfs=Rootfs(Path(spec.root.path), direct=True, own=own_rootfs),
        guest_seccomp=not config.runtime.disable_guest_seccomp,
        create_timeout_s=float(config.runtime.create_container_timeout),
        holds_pid_namespace=about.kind is ContainerKind.SANDBOX,
        bundle=bundle,
    )


def _guest_memory(mount: oci.Mount) -> oci.Mount:
    """A tmpfs of the guest, as large, for that which an engine has mounted on the host as /dev/shm of a pod:
    by a share the memory would be the host's, and no limit of a container would count it."""
    if mount.destination.rstrip("/") != SHM or not oci.is_bind(mount):
        return mount
    if (size := shared_memory_size(Path(mount.source))) is None:
        return mount  # a volume
    access = () if parse_access(mount.options) is Access.WRITABLE else ("ro",)
    return oci.Mount(destination=SHM, type="tmpfs", source="shm", options=(*access, f"size={size}"))


def _shm_size(spec: oci.Spec) -> int:
    """Bytes. Source: tmpfs(5), size."""
    for mount in spec.mounts:
        if mount.destination == SHM and mount.type == "tmpfs":
            for option in mount.options:
                if option.startswith("size=") and not option.endswith("%"):
                    return parse_size(option.removeprefix("size="), f"{SHM}, size") or DEFAULT_SHM_BYTES
    return DEFAULT_SHM_BYTES


async def take_network(container: Container) -> None:
    """Before it is started: engines may have configured its network since it was created. Raises KatapodError."""
    sandbox = container.sandbox
    await sandbox.rescan_network()
    if sandbox.network is not None:
        await sandbox.names.serve(sandbox.network.netns, _dns_of(container.plan.spec))


def limits_of(spec: oci.Spec, about: PodAnnotations) -> ContainerLimits | None:
    """None for the pause container of a pod."""
    if about.kind is ContainerKind.SANDBOX:
        return None
    return ContainerLimits(memory_bytes=spec.memory_limit, cpus=spec.cpu_limit)


def netns_of(spec: oci.Spec) -> str | None:
    """The path of the network namespace; empty for a new one. Raises UsageError for the host's."""
    for namespace in spec.linux.namespaces:
        if namespace.type == "network":
            return namespace.path
    raise UsageError(
        "cannot use the host's network: a virtual machine has a network stack of its own",
        hint="leave out hostNetwork: true (ctr: --net-host), or run this pod with another RuntimeClass",
    )


def _dns_of(spec: oci.Spec) -> tuple[str, ...]:
    """The lines of its resolv.conf; none if it cannot be read: the containers get theirs as a mount."""
    sources = [mount.source for mount in spec.mounts if mount.destination == "/etc/resolv.conf" and mount.source]
    try:
        with open(sources[-1]) as handle:
            return tuple(line for line in handle.read(RESOLV_CONF_MAX).splitlines() if line and "\0" not in line)
    except (IndexError, OSError, ValueError):
        return ()


def _image_of(spec: oci.Spec) -> str:
    keys = ("io.kubernetes.cri.image-name", "io.kubernetes.cri-o.ImageName")
    return next((spec.annotations[key] for key in keys if key in spec.annotations), "")
