"""From the spec of a container on the host to the one that its guest gets.

Pure. Source: what Kata's runtime strips before it sends a spec (constrainGRPCSpec), with one deviation:
linux.resources.pids is kept, since the guest's kernel can enforce it and the host's cannot see the
container's processes; dropping it, as upstream does, would drop a limit that a user has set.
"""

from collections.abc import Mapping

from msgspec.structs import replace

from katapod.model import oci
from katapod.model.errors import SpecError
from katapod.model.mount_options import Access, parse_access

__all__ = [
    "is_privileged",
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
    mount whose files are the host's; one that is no bind mount, such as /dev/shm, becomes one.
    `guest_seccomp`: the agent supports seccomp and the configuration does not forbid it.
    Raises SpecError if such a mount has no guest path: the guest must never resolve a host path.
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
            resources=_resources(spec),
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
    """Labels belong to the host's security modules, which the guest does not have."""
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


def is_privileged(spec: oci.Spec) -> bool:
    """Whether the container is to have all rights.

    Engines that are told to leave out the host's devices (privileged_without_host_devices) may leave out the rule that
    opens them as well. Then it shows in that nothing else is held back: no other container may write to /sys.
    """
    linux, caps = spec.linux, spec.process.capabilities
    if linux.resources is not None and any(_opens_all(rule) for rule in linux.resources.devices):
        return True
    held_back = linux.masked_paths or linux.readonly_paths or linux.seccomp
    sys_is_writable = any(mount.type == "sysfs" and "ro" not in mount.options for mount in spec.mounts)
    return bool(not held_back and sys_is_writable and caps and {"CAP_SYS_ADMIN", "CAP_MKNOD"} <= set(caps.bounding))


def _opens_all(rule: oci.DeviceCgroup) -> bool:
    everything = rule.type in ("", "a") and rule.major in (None, -1) and rule.minor in (None, -1)
    return rule.allow and everything and set("rwm") <= set(rule.access)


def _resources(spec: oci.Spec) -> oci.Resources | None:
    """A privileged container keeps the one rule that means all devices: in the guest, all of the guest's."""
    resources = spec.linux.resources
    if not is_privileged(spec):
        return resources_for_guest(resources) if resources else None
    rule = oci.DeviceCgroup(allow=True, access="rwm")
    return replace(resources_for_guest(resources or oci.Resources()), devices=(rule,))


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
        elif oci.is_of_host(mount):
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
