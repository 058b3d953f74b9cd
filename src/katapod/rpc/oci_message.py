"""OCI specs as messages of the agent protocol; katapod.agent.spec is the reverse.

In proto3 an absent number is 0 and an absent string is empty. What upstream's protocol has no field for, but would
change a container's behaviour if it were dropped, is in fields of our own, which not every agent reads: features_needed
tells which extensions a message requires.
"""

from typing import Any

import msgspec
from msgspec import Struct

from katapod.model import oci
from katapod.rpc.features import CPU_BURST, CPU_IDLE, PERSONALITY, SECCOMP_DEFAULT_ERRNO, UMASK, UNIFIED
from katapod.rpc.pb import oci_pb2

__all__ = ["features_needed", "process_to_message", "resources_to_message", "spec_to_message"]

_FIELDS: dict[type[Struct], dict[str, str]] = {
    oci.Spec: {
        "oci_version": "Version",
        "process": "Process",
        "root": "Root",
        "hostname": "Hostname",
        "mounts": "Mounts",
        "hooks": "Hooks",
        "annotations": "Annotations",
        "linux": "Linux",
    },
    oci.Process: {
        "terminal": "Terminal",
        "console_size": "ConsoleSize",
        "user": "User",
        "args": "Args",
        "env": "Env",
        "cwd": "Cwd",
        "capabilities": "Capabilities",
        "rlimits": "Rlimits",
        "no_new_privileges": "NoNewPrivileges",
        "apparmor_profile": "ApparmorProfile",
        "oom_score_adj": "OOMScoreAdj",
        "selinux_label": "SelinuxLabel",
    },
    oci.Box: {"height": "Height", "width": "Width"},
    oci.User: {"uid": "UID", "gid": "GID", "additional_gids": "AdditionalGids", "umask": "Umask"},
    oci.Capabilities: {
        "bounding": "Bounding",
        "effective": "Effective",
        "inheritable": "Inheritable",
        "permitted": "Permitted",
        "ambient": "Ambient",
    },
    oci.Rlimit: {"type": "Type", "hard": "Hard", "soft": "Soft"},
    oci.Root: {"path": "Path", "readonly": "Readonly"},
    oci.Mount: {"destination": "destination", "type": "type", "source": "source", "options": "options"},
    oci.Hooks: {
        "prestart": "Prestart",
        "create_runtime": "CreateRuntime",
        "create_container": "CreateContainer",
        "start_container": "StartContainer",
        "poststart": "Poststart",
        "poststop": "Poststop",
    },
    oci.Hook: {"path": "Path", "args": "Args", "env": "Env", "timeout": "Timeout"},
    oci.Linux: {
        "uid_mappings": "UIDMappings",
        "gid_mappings": "GIDMappings",
        "sysctl": "Sysctl",
        "resources": "Resources",
        "cgroups_path": "CgroupsPath",
        "namespaces": "Namespaces",
        "devices": "Devices",
        "seccomp": "Seccomp",
        "rootfs_propagation": "RootfsPropagation",
        "masked_paths": "MaskedPaths",
        "readonly_paths": "ReadonlyPaths",
        "mount_label": "MountLabel",
        "intel_rdt": "IntelRdt",
        "personality": "Personality",
    },
    oci.Personality: {"domain": "Domain", "flags": "Flags"},
    oci.IdMapping: {"host_id": "HostID", "container_id": "ContainerID", "size": "Size"},
    oci.Namespace: {"type": "Type", "path": "Path"},
    oci.Device: {
        "path": "Path",
        "type": "Type",
        "major": "Major",
        "minor": "Minor",
        "file_mode": "FileMode",
        "uid": "UID",
        "gid": "GID",
    },
    oci.Resources: {
        "devices": "Devices",
        "memory": "Memory",
        "cpu": "CPU",
        "pids": "Pids",
        "block_io": "BlockIO",
        "hugepage_limits": "HugepageLimits",
        "network": "Network",
        "unified": "Unified",
    },
    oci.DeviceCgroup: {
        "allow": "Allow",
        "type": "Type",
        "major": "Major",
        "minor": "Minor",
        "access": "Access",
    },
    oci.Memory: {
        "limit": "Limit",
        "reservation": "Reservation",
        "swap": "Swap",
        "kernel": "Kernel",
        "kernel_tcp": "KernelTCP",
        "swappiness": "Swappiness",
        "disable_oom_killer": "DisableOOMKiller",
    },
    oci.Cpu: {
        "shares": "Shares",
        "quota": "Quota",
        "period": "Period",
        "realtime_runtime": "RealtimeRuntime",
        "realtime_period": "RealtimePeriod",
        "burst": "Burst",
        "idle": "Idle",
        "cpus": "Cpus",
        "mems": "Mems",
    },
    oci.Pids: {"limit": "Limit"},
    oci.BlockIO: {
        "weight": "Weight",
        "leaf_weight": "LeafWeight",
        "weight_device": "WeightDevice",
        "throttle_read_bps_device": "ThrottleReadBpsDevice",
        "throttle_write_bps_device": "ThrottleWriteBpsDevice",
        "throttle_read_iops_device": "ThrottleReadIOPSDevice",
        "throttle_write_iops_device": "ThrottleWriteIOPSDevice",
    },
    oci.WeightDevice: {"major": "Major", "minor": "Minor", "weight": "Weight", "leaf_weight": "LeafWeight"},
    oci.ThrottleDevice: {"major": "Major", "minor": "Minor", "rate": "Rate"},
    oci.HugepageLimit: {"page_size": "Pagesize", "limit": "Limit"},
    oci.Network: {"class_id": "ClassID", "priorities": "Priorities"},
    oci.InterfacePriority: {"name": "Name", "priority": "Priority"},
    oci.Seccomp: {
        "default_action": "DefaultAction",
        "default_errno_ret": "DefaultErrnoRet",
        "architectures": "Architectures",
        "flags": "Flags",
        "syscalls": "Syscalls",
    },
    oci.Syscall: {"names": "Names", "action": "Action", "errno_ret": "errnoret", "args": "Args"},
    oci.SeccompArg: {"index": "Index", "value": "Value", "value_two": "ValueTwo", "op": "Op"},
    oci.IntelRdt: {"l3_cache_schema": "L3CacheSchema"},
}
"""Struct -> its fields -> the message's fields."""

_DEFAULT_UMASK = 0o22
"""The umask that crun sets if there is none; Podman writes it into every config.json."""

_EPERM = 1
"""The errno of a seccomp filter without defaultErrnoRet."""


def spec_to_message(spec: oci.Spec) -> oci_pb2.Spec:
    message = oci_pb2.Spec()
    _fill(message, spec)
    return message


def process_to_message(process: oci.Process) -> oci_pb2.Process:
    """For ExecProcess."""
    message = oci_pb2.Process()
    _fill(message, process)
    return message


def features_needed(process: oci_pb2.Process, linux: oci_pb2.Linux | None = None) -> frozenset[str]:
    """The features (katapod.rpc.features) that an agent must have to do what the message says."""
    found = set()
    if process.User.HasField("Umask") and process.User.Umask != _DEFAULT_UMASK:
        found.add(UMASK)
    if linux is not None:
        found |= _needed_by_linux(linux)
    return frozenset(found)


def _needed_by_linux(linux: oci_pb2.Linux) -> set[str]:
    cpu = linux.Resources.CPU
    needed = {
        SECCOMP_DEFAULT_ERRNO: linux.Seccomp.HasField("DefaultErrnoRet") and linux.Seccomp.DefaultErrnoRet != _EPERM,
        PERSONALITY: linux.HasField("Personality"),
        UNIFIED: bool(linux.Resources.Unified),
        CPU_BURST: bool(cpu.Burst),
        CPU_IDLE: bool(cpu.Idle),
    }
    return {name for name, is_needed in needed.items() if is_needed}


def resources_to_message(resources: oci.Resources) -> oci_pb2.LinuxResources:
    """For UpdateContainer."""
    message = oci_pb2.LinuxResources()
    _fill(message, resources)
    return message


def _fill(message: Any, value: Struct) -> None:
    for name, target in _FIELDS[type(value)].items():
        item = getattr(value, name)
        if item is None or item is msgspec.UNSET:
            continue
        if isinstance(item, Struct):
            inner = getattr(message, target)
            inner.SetInParent()  # present even if all its fields have default values
            _fill(inner, item)
        elif isinstance(item, tuple) and item and isinstance(item[0], Struct):
            for one in item:
                _fill(getattr(message, target).add(), one)
        elif isinstance(item, tuple):
            getattr(message, target).extend(item)
        elif isinstance(item, dict):
            getattr(message, target).update(item)
        else:
            setattr(message, target, item)
