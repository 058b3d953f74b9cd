"""From the spec of a container on the host to the one that its guest gets.

Pure. Source: upstream's rules (facts of the agent protocol: what the host strips), with one deviation:
linux.resources.pids is kept, since the guest's kernel can enforce it and the host's cannot see the
container's processes; dropping it, as upstream does, would drop a limit that a user has set.
"""

from collections.abc import Mapping

from msgspec.structs import replace

from katapod.model import oci
from katapod.model.errors import SpecError
from katapod.model.mount_options import Access, parse_access

__all__ = [
    "process_for_guest",
    "resources_for_guest",
    "shares_pid_namespace",
    "strip_for_guest",
    "visible_mounts",
    "without_host_devices",
]

_HOST_NAMESPACES = frozenset({"cgroup", "network", "time", "pid"})
"""The guest's agent sets these up: network and time are the sandbox's, cgroup its own choice, and pid
follows the sandbox_pidns flag of the request."""

_HOST_ONLY = frozenset({"/dev/kmsg", "/dev/mem", "/dev/port"})
"""Nobody asks for these by name: with them an engine has given a privileged container all that the host has."""

_MOUNT_FLAGS = frozenset({"ro", "nosuid", "nodev", "noexec"})
"""A bind mount has these of its own; size and mode are those of the file system behind it."""


def strip_for_guest(
    spec: oci.Spec, *, root_path: str, mount_sources: Mapping[str, str], guest_seccomp: bool
) -> oci.Spec:
    """Return the guest's version of `spec`.

    `root_path`: guest path of the root file system. `mount_sources`: destination -> guest path for every
    bind mount; a mount of another type that is named there, such as /dev/shm, becomes a bind mount.
    `guest_seccomp`: the agent supports seccomp and the configuration does not forbid it.
    Raises SpecError if a bind mount has no guest path: the guest must never resolve a host path.
    """
    linux = spec.linux
    return replace(
        spec,
        hooks=None,
        domainname="",
        root=replace(spec.root, path=root_path),
        process=process_for_guest(spec.process),
        mounts=_mounts(spec.mounts, mount_sources),
        linux=replace(
            linux,
            seccomp=linux.seccomp if guest_seccomp else None,
            mount_label="",
            intel_rdt=None,
            sysctl={**linux.sysctl, "kernel.domainname": spec.domainname} if spec.domainname else linux.sysctl,
            resources=resources_for_guest(linux.resources) if linux.resources else None,
            namespaces=tuple(
                oci.Namespace(type=namespace.type)
                for namespace in linux.namespaces
                if namespace.type not in _HOST_NAMESPACES
            ),
            devices=tuple(device for device in linux.devices if not device.path.startswith("/dev/vfio/")),
        ),
    )


def shares_pid_namespace(spec: oci.Spec) -> bool:
    """Whether the container joins a pid namespace, which inside a guest can only be the sandbox's."""
    return any(namespace.type == "pid" and namespace.path for namespace in spec.linux.namespaces)


def process_for_guest(process: oci.Process) -> oci.Process:
    """Labels are of the host's security modules, which the guest has not."""
    return replace(process, selinux_label="", apparmor_profile="")


def without_host_devices(spec: oci.Spec) -> oci.Spec:
    """Without devices, if they are all of the host's: a privileged container is privileged in its guest. Plugging the
    host's disks in would hand these over."""
    if not any(device.path in _HOST_ONLY for device in spec.linux.devices):
        return spec
    return replace(spec, linux=replace(spec.linux, devices=()))


def visible_mounts(mounts: tuple[oci.Mount, ...]) -> tuple[oci.Mount, ...]:
    """Without those that a later one on the same destination hides: engines put their own /dev/shm after the usual
    one. A path has one source in the guest then."""
    last = {mount.destination.rstrip("/"): index for index, mount in enumerate(mounts)}
    return tuple(mount for index, mount in enumerate(mounts) if last[mount.destination.rstrip("/")] == index)


def resources_for_guest(resources: oci.Resources) -> oci.Resources:
    """CPU numbers and NUMA nodes are the host's; devices, block IO and net_cls are not the guest's."""
    return replace(
        resources,
        devices=(),
        block_io=None,
        network=None,
        cpu=replace(resources.cpu, cpus="", mems="") if resources.cpu else None,
    )


def _mounts(mounts: tuple[oci.Mount, ...], sources: Mapping[str, str]) -> tuple[oci.Mount, ...]:
    found = []
    seen: set[str] = set()
    for mount in mounts:
        destination = mount.destination
        if destination in sources:
            if destination in seen:
                raise SpecError(f"cannot mount on {destination}: two mounts have this destination")
            seen.add(destination)
            found.append(_bound(mount, sources[destination]))
        elif oci.is_bind(mount):
            raise SpecError(f"cannot mount {mount.source} on {destination}: it is not shared with the guest")
        else:
            found.append(mount)
    if left := sources.keys() - seen:
        raise SpecError(f"cannot mount on {', '.join(sorted(left))}: the container has no such mount")
    return tuple(found)


def _guest_options(options: tuple[str, ...]) -> tuple[str, ...]:
    """Without rro and rrw, which crun 1.8 does for directories only. The host sees to what is below, and what virtio-fs
    mounts by itself takes over the flags of the mount above it."""
    if not {"rro", "rrw"} & set(options):
        return options
    others = tuple(option for option in options if option not in ("ro", "rw", "rro", "rrw"))
    return (*others, "ro" if parse_access(options) is Access.READ_ONLY else "rw")


def _bound(mount: oci.Mount, source: str) -> oci.Mount:
    if oci.is_bind(mount):
        return replace(mount, source=source, options=_guest_options(mount.options))
    kept = tuple(option for option in mount.options if option in _MOUNT_FLAGS)
    return oci.Mount(destination=mount.destination, type="bind", source=source, options=("rbind", *kept))
