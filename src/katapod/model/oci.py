"""The OCI runtime specification's config.json (1.0 to 1.2, Linux), as frozen values.

Only the parts are modelled that can reach a guest (the messages of oci.proto carry them). Unknown keys
are ignored because the specification says so; `unknown_keys` lists them for the debug log. Keys that it knows and a
guest cannot have are modelled too, and refused: an error is what it asks for where a property cannot be applied. A
null stands for an absent value, as in the Go programs that write most of these files.
Source: opencontainers/runtime-spec, config.md and config-linux.md.
"""

from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import Struct, field

from katapod.model.json_text import encode_json
from katapod.model.oci_json import I64, U32, U64, Part, decode, impossible, wrong
from katapod.model.oci_seccomp import Seccomp, SeccompArg, Syscall, check_seccomp

__all__ = [
    "BlockIO",
    "Box",
    "Capabilities",
    "Cpu",
    "Device",
    "DeviceCgroup",
    "Hook",
    "Hooks",
    "HugepageLimit",
    "IdMapping",
    "IntelRdt",
    "InterfacePriority",
    "Linux",
    "Memory",
    "Mount",
    "Namespace",
    "Network",
    "Personality",
    "Pids",
    "Process",
    "Resources",
    "Rlimit",
    "Root",
    "Seccomp",
    "SeccompArg",
    "Spec",
    "Syscall",
    "ThrottleDevice",
    "User",
    "WeightDevice",
    "encode_process",
    "encode_spec",
    "has_parent_component",
    "bind_sources",
    "is_bind",
    "is_of_host",
    "parse_bundle_spec",
    "parse_process",
    "parse_resources",
    "parse_spec",
    "unknown_keys",
]


class Box(Part, frozen=True, kw_only=True):
    """Size of a terminal in characters."""

    height: U32
    width: U32


class User(Part, frozen=True, kw_only=True, omit_defaults=False):
    uid: U32 = 0
    gid: U32 = 0
    additional_gids: tuple[U32, ...] = ()
    umask: U32 | msgspec.UnsetType = msgspec.UNSET


class Capabilities(Part, frozen=True, kw_only=True):
    """Names such as CAP_CHOWN."""

    bounding: tuple[str, ...] = ()
    effective: tuple[str, ...] = ()
    inheritable: tuple[str, ...] = ()
    permitted: tuple[str, ...] = ()
    ambient: tuple[str, ...] = ()


class Rlimit(Part, frozen=True, kw_only=True):
    """`type` such as RLIMIT_NOFILE; 2**64 - 1 means no limit."""

    type: str
    hard: U64
    soft: U64


class Process(Part, frozen=True, kw_only=True):
    terminal: bool = False
    console_size: Box | None = None
    user: User = field(default_factory=User)
    args: tuple[str, ...]
    env: tuple[str, ...] = ()
    cwd: str
    capabilities: Capabilities | None = None
    rlimits: tuple[Rlimit, ...] = ()
    no_new_privileges: bool = False
    apparmor_profile: str = ""
    oom_score_adj: I64 | None = None
    selinux_label: str = ""
    scheduler: dict[str, Any] | None = None
    """Refused, as is `io_priority`: crun 1.8 does not know them."""
    io_priority: dict[str, Any] | None = None


class Root(Part, frozen=True, kw_only=True):
    path: str
    readonly: bool = False


class Mount(Part, frozen=True, kw_only=True):
    destination: str
    type: str = ""
    source: str = ""
    options: tuple[str, ...] = ()
    uid_mappings: tuple[dict[str, Any], ...] = ()
    """Refused, as is `gid_mappings`: the guest's virtio-fs has no id-mapped mounts before Linux 6.12."""
    gid_mappings: tuple[dict[str, Any], ...] = ()


class Hook(Part, frozen=True, kw_only=True):
    """`timeout` in seconds."""

    path: str
    args: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    timeout: I64 | None = None


class Hooks(Part, frozen=True, kw_only=True):
    prestart: tuple[Hook, ...] = ()
    create_runtime: tuple[Hook, ...] = ()
    create_container: tuple[Hook, ...] = ()
    start_container: tuple[Hook, ...] = ()
    poststart: tuple[Hook, ...] = ()
    poststop: tuple[Hook, ...] = ()


class IdMapping(Part, frozen=True, kw_only=True):
    host_id: U32 = field(name="hostID")
    container_id: U32 = field(name="containerID")
    size: U32


class Namespace(Part, frozen=True, kw_only=True):
    """`type`: pid, network, mount, ipc, uts, user, cgroup or time. An empty path means a new one."""

    type: str
    path: str = ""


class Device(Part, frozen=True, kw_only=True):
    """A device node in the container. `type`: c, b, u or p."""

    path: str
    type: str
    major: I64 = 0
    minor: I64 = 0
    file_mode: U32 | None = None
    uid: U32 | None = None
    gid: U32 | None = None


class DeviceCgroup(Part, frozen=True, kw_only=True):
    """An absent major or minor number means all of them."""

    allow: bool
    type: str = ""
    major: I64 | None = None
    minor: I64 | None = None
    access: str = ""


class Memory(Part, frozen=True, kw_only=True):
    """Bytes; -1 means no limit. `swap` is the limit of memory and swap together."""

    limit: I64 | None = None
    reservation: I64 | None = None
    swap: I64 | None = None
    kernel: I64 | None = None
    kernel_tcp: I64 | None = field(default=None, name="kernelTCP")
    swappiness: U64 | None = None
    disable_oom_killer: bool = field(default=False, name="disableOOMKiller")


class Cpu(Part, frozen=True, kw_only=True):
    """`quota`, `period` and `burst` in microseconds; a quota of 0 or less means no limit."""

    shares: U64 | None = None
    quota: I64 | None = None
    period: U64 | None = None
    realtime_runtime: I64 | None = None
    realtime_period: U64 | None = None
    burst: U64 | None = None
    idle: I64 | None = None
    cpus: str = ""
    mems: str = ""


class Pids(Part, frozen=True, kw_only=True):
    """A limit of 0 or less means no limit."""

    limit: I64


class WeightDevice(Part, frozen=True, kw_only=True):
    major: I64
    minor: I64
    weight: U32 | None = None
    leaf_weight: U32 | None = None


class ThrottleDevice(Part, frozen=True, kw_only=True):
    """`rate` in bytes or operations per second."""

    major: I64
    minor: I64
    rate: U64


class BlockIO(Part, frozen=True, kw_only=True):
    weight: U32 | None = None
    leaf_weight: U32 | None = None
    weight_device: tuple[WeightDevice, ...] = ()
    throttle_read_bps_device: tuple[ThrottleDevice, ...] = ()
    throttle_write_bps_device: tuple[ThrottleDevice, ...] = ()
    throttle_read_iops_device: tuple[ThrottleDevice, ...] = field(default=(), name="throttleReadIOPSDevice")
    throttle_write_iops_device: tuple[ThrottleDevice, ...] = field(default=(), name="throttleWriteIOPSDevice")


class HugepageLimit(Part, frozen=True, kw_only=True):
    page_size: str
    limit: U64


class InterfacePriority(Part, frozen=True, kw_only=True):
    name: str
    priority: U32


class Network(Part, frozen=True, kw_only=True):
    class_id: U32 | None = field(default=None, name="classID")
    priorities: tuple[InterfacePriority, ...] = ()


class Resources(Part, frozen=True, kw_only=True):
    devices: tuple[DeviceCgroup, ...] = ()
    memory: Memory | None = None
    cpu: Cpu | None = None
    pids: Pids | None = None
    block_io: BlockIO | None = field(default=None, name="blockIO")
    hugepage_limits: tuple[HugepageLimit, ...] = ()
    network: Network | None = None
    unified: dict[str, str] = field(default_factory=dict)
    """Files of the container's cgroup (v2), which a guest always has."""


class Personality(Part, frozen=True, kw_only=True):
    """`domain`: LINUX or LINUX32, what uname(2) tells."""

    domain: str
    flags: tuple[str, ...] = ()


class IntelRdt(Part, frozen=True, kw_only=True):
    l3_cache_schema: str = field(default="", name="l3CacheSchema")


class Linux(Part, frozen=True, kw_only=True):
    uid_mappings: tuple[IdMapping, ...] = ()
    gid_mappings: tuple[IdMapping, ...] = ()
    sysctl: dict[str, str] = field(default_factory=dict)
    resources: Resources | None = None
    cgroups_path: str = ""
    namespaces: tuple[Namespace, ...] = ()
    devices: tuple[Device, ...] = ()
    seccomp: Seccomp | None = None
    rootfs_propagation: str = ""
    masked_paths: tuple[str, ...] = ()
    readonly_paths: tuple[str, ...] = ()
    mount_label: str = ""
    intel_rdt: IntelRdt | None = None
    personality: Personality | None = None
    time_offsets: dict[str, Any] = field(default_factory=dict)
    """Refused: crun 1.8 does not know them."""
    net_devices: dict[str, Any] = field(default_factory=dict)
    """Refused: they are the host's."""


class Spec(Part, frozen=True, kw_only=True):
    """One container. `process` and `root` are optional in the specification; a runtime needs both."""

    oci_version: str
    process: Process
    root: Root
    hostname: str = ""
    domainname: str = ""
    mounts: tuple[Mount, ...] = ()
    hooks: Hooks | None = None
    annotations: dict[str, str] = field(default_factory=dict)
    linux: Linux = field(default_factory=Linux)

    @property
    def memory_limit(self) -> int | None:
        """Bytes, or None if there is no limit."""
        resources = self.linux.resources
        limit = resources.memory.limit if resources and resources.memory else None
        return limit if limit is not None and limit > 0 else None

    @property
    def cpu_limit(self) -> float | None:
        """CPUs (quota divided by period), or None if there is no limit."""
        cpu = self.linux.resources.cpu if self.linux.resources else None
        if cpu is None or cpu.quota is None or cpu.quota <= 0:
            return None
        return cpu.quota / (cpu.period or 100_000)


_NAMESPACE_TYPES = frozenset({"pid", "network", "mount", "ipc", "uts", "user", "cgroup", "time"})


def parse_spec(data: bytes, where: str = "config.json") -> Spec:
    """Parse and check one config.json. Raises SpecError that names `where` and the JSON path."""
    spec = decode(data, Spec, where)
    _check_spec(spec, where)
    return spec


def parse_bundle_spec(data: bytes, bundle_dir: str, where: str = "config.json") -> Spec:
    """Like parse_spec, with relative paths resolved against `bundle_dir`, an absolute path.

    That is root.path and the sources of bind mounts. None of them can leave the bundle by "..";
    symbolic links are the business of who opens the path. Raises SpecError.
    """
    spec = parse_spec(data, where)
    root = msgspec.structs.replace(spec.root, path=_below(bundle_dir, spec.root.path))
    mounts = []
    for index, mount in enumerate(spec.mounts):
        if is_bind(mount) and not mount.source.startswith("/"):
            path = f"mounts[{index}].source"
            _refuse_parent(mount.source, where, path)
            if not mount.source:
                raise wrong(where, path, "a bind mount needs one")
            mount = msgspec.structs.replace(mount, source=_below(bundle_dir, mount.source))
        mounts.append(mount)
    return msgspec.structs.replace(spec, root=root, mounts=tuple(mounts))


def parse_process(data: bytes, where: str = "process.json") -> Process:
    """Parse the process of an exec (the OCI command line's `exec --process FILE`). Raises SpecError."""
    process = decode(data, Process, where)
    _check_process(process, where, "")
    return process


def parse_resources(data: bytes, where: str = "resources") -> Resources:
    """Parse what a running container's limits are to be. Raises SpecError."""
    return decode(data, Resources, where)


def encode_spec(spec: Spec) -> bytes:
    """The config.json of `spec`; parse_spec gives an equal value back."""
    return encode_json(spec)


def encode_process(process: Process) -> bytes:
    return msgspec.json.encode(process)


def is_bind(mount: Mount) -> bool:
    """Whether the source is a path. Engines write the type "bind", "none" or nothing, and an option."""
    return mount.type == "bind" or "bind" in mount.options or "rbind" in mount.options


def bind_sources(spec: Spec) -> tuple[str, ...]:
    return tuple(mount.source for mount in spec.mounts if is_bind(mount))


_KERNELS_OWN = frozenset(
    {
        *("proc", "sysfs", "tmpfs", "ramfs", "devtmpfs", "devpts", "mqueue", "cgroup", "cgroup2", "hugetlbfs"),
        *("securityfs", "debugfs", "tracefs", "configfs", "fusectl", "bpf", "pstore", "efivarfs", "binfmt_misc"),
    }
)
"""Types of mounts that a kernel makes of nothing, each its own."""


def is_of_host(mount: Mount) -> bool:
    """Whether what is mounted is found on the host: a path, or a file system such as an overlay of its directories."""
    return is_bind(mount) or mount.type not in ("", *_KERNELS_OWN)


def has_parent_component(path: str) -> bool:
    """Whether one component of `path` is ".."."""
    return ".." in path.split("/")


def unknown_keys(data: bytes, spec: Spec) -> tuple[str, ...]:
    """JSON paths in `data`, which `spec` was parsed from, that this model does not know and that say something."""
    return tuple(_unknown(msgspec.json.decode(data), spec, ""))


def _unknown(raw: Any, value: Any, path: str) -> Iterator[str]:
    if isinstance(value, Struct) and isinstance(raw, dict):
        known = dict(zip(value.__struct_encode_fields__, value.__struct_fields__, strict=True))
        for key, item in raw.items():
            here = f"{path}.{key}" if path else key
            if key in known:
                yield from _unknown(item, getattr(value, known[key]), here)
            elif item not in (None, "", [], {}):
                yield here
    elif isinstance(value, tuple) and isinstance(raw, list):
        for index, (item, one) in enumerate(zip(raw, value, strict=True)):
            yield from _unknown(item, one, f"{path}[{index}]")


def _check_spec(spec: Spec, where: str) -> None:
    if not spec.oci_version.startswith("1."):
        raise wrong(where, "ociVersion", f"{spec.oci_version!r} is not supported, only 1.x is")
    _check_process(spec.process, where, "process.")
    if not spec.root.path:
        raise wrong(where, "root.path", "is empty")
    _refuse_parent(spec.root.path, where, "root.path")
    for index, mount in enumerate(spec.mounts):
        _check_guest_path(mount.destination, where, f"mounts[{index}].destination")
        for name, mappings in (("uidMappings", mount.uid_mappings), ("gidMappings", mount.gid_mappings)):
            if mappings:
                raise impossible(where, f"mounts[{index}].{name}", "id-mapped mounts cannot be shared with a guest")
    linux = spec.linux
    if linux.seccomp:
        check_seccomp(linux.seccomp, where, "linux.seccomp")
    if linux.time_offsets:
        raise impossible(where, "linux.timeOffsets", "the clocks of a container are its guest's")
    if linux.net_devices:
        raise impossible(where, "linux.netDevices", "devices of the host's network cannot be moved into a guest")
    for index, device in enumerate(linux.devices):
        _check_guest_path(device.path, where, f"linux.devices[{index}].path")
    for name, paths in (("maskedPaths", linux.masked_paths), ("readonlyPaths", linux.readonly_paths)):
        for index, path in enumerate(paths):
            _check_guest_path(path, where, f"linux.{name}[{index}]")
    seen: set[str] = set()
    for index, namespace in enumerate(linux.namespaces):
        path = f"linux.namespaces[{index}].type"
        if namespace.type not in _NAMESPACE_TYPES:
            raise wrong(where, path, f"{namespace.type!r} is not a namespace")
        if namespace.type in seen:
            raise wrong(where, path, f"{namespace.type!r} occurs twice")
        seen.add(namespace.type)


def _check_process(process: Process, where: str, prefix: str) -> None:
    if not process.args:
        raise wrong(where, f"{prefix}args", "is empty, there is no command to run")
    if not process.args[0]:
        raise wrong(where, f"{prefix}args[0]", "is empty, there is no command to run")
    if not process.cwd.startswith("/"):
        raise wrong(where, f"{prefix}cwd", f"{process.cwd!r} is not an absolute path")
    for name, value in (("scheduler", process.scheduler), ("ioPriority", process.io_priority)):
        if value:
            raise impossible(where, f"{prefix}{name}", "crun does not know it in every guest")
    seen: set[str] = set()
    for index, rlimit in enumerate(process.rlimits):
        path = f"{prefix}rlimits[{index}]"
        if rlimit.type in seen:
            raise wrong(where, f"{path}.type", f"{rlimit.type!r} occurs twice")
        if rlimit.soft > rlimit.hard:
            raise wrong(where, f"{path}.soft", f"{rlimit.soft} exceeds the hard limit {rlimit.hard}")
        seen.add(rlimit.type)


def _check_guest_path(path: str, where: str, json_path: str) -> None:
    if not path.startswith("/"):
        raise wrong(where, json_path, f"{path!r} is not an absolute path")
    _refuse_parent(path, where, json_path)


def _refuse_parent(path: str, where: str, json_path: str) -> None:
    if has_parent_component(path):
        raise wrong(where, json_path, f"{path!r} has a '..' component")


def _below(bundle_dir: str, path: str) -> str:
    """`path` itself if it is absolute, else below the bundle; without "." components."""
    if path.startswith("/"):
        return path
    parts = [part for part in path.split("/") if part not in ("", ".")]
    return "/".join([bundle_dir.rstrip("/"), *parts])
