"""The OCI specification: from the protocol's messages to crun's config.json. Pure.

In proto3 an absent number is 0 and an absent string is empty; both are omitted where OCI has optional
fields. Source: OCI runtime-spec 1.0, config.md and config-linux.md.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from katapod.rpc.pb import oci_pb2

    Json = dict[str, Any]

__all__ = ["cgroup_path", "process_json", "resources_json", "spec_json"]

NAMESPACES_NOT_TAKEN = ("network", "time")  # the guest's own, regardless of the host's


def _present(**values: Any) -> Json:
    """Only the values that are set."""
    return {key: value for key, value in values.items() if value not in (0, "", None, [], {}, False)}


def process_json(process: oci_pb2.Process) -> Json:
    """config.json `process`, also what `crun exec --process` reads."""
    user: Json = {"uid": process.User.UID, "gid": process.User.GID}
    if process.User.AdditionalGids:
        user["additionalGids"] = list(process.User.AdditionalGids)
    if process.User.HasField("Umask"):
        user["umask"] = process.User.Umask
    result: Json = {
        "terminal": process.Terminal,
        "user": user,
        "args": list(process.Args),
        "env": list(process.Env),
        "cwd": process.Cwd or "/",
        "noNewPrivileges": process.NoNewPrivileges,
        "oomScoreAdj": process.OOMScoreAdj,
    }
    if process.Terminal and process.ConsoleSize.Height and process.ConsoleSize.Width:
        result["consoleSize"] = {
            "height": process.ConsoleSize.Height,
            "width": process.ConsoleSize.Width,
        }
    if process.HasField("Capabilities"):
        sets = process.Capabilities
        result["capabilities"] = {
            "bounding": list(sets.Bounding),
            "effective": list(sets.Effective),
            "inheritable": list(sets.Inheritable),
            "permitted": list(sets.Permitted),
            "ambient": list(sets.Ambient),
        }
    if process.Rlimits:
        result["rlimits"] = [{"type": r.Type, "hard": r.Hard, "soft": r.Soft} for r in process.Rlimits]
    return result | _present(apparmorProfile=process.ApparmorProfile, selinuxLabel=process.SelinuxLabel)


def _hooks(hooks: oci_pb2.Hooks) -> Json:
    def lists(entries: Any) -> list[Json]:
        return [
            {"path": entry.Path} | _present(args=list(entry.Args), env=list(entry.Env), timeout=entry.Timeout)
            for entry in entries
        ]

    return _present(
        prestart=lists(hooks.Prestart),
        createRuntime=lists(hooks.CreateRuntime),
        createContainer=lists(hooks.CreateContainer),
        startContainer=lists(hooks.StartContainer),
        poststart=lists(hooks.Poststart),
        poststop=lists(hooks.Poststop),
    )


def _seccomp(seccomp: oci_pb2.LinuxSeccomp) -> Json:
    calls = []
    for rule in seccomp.Syscalls:
        call: Json = {"names": list(rule.Names), "action": rule.Action}
        if rule.HasField("errnoret"):
            call["errnoRet"] = rule.errnoret
        if rule.Args:
            call["args"] = [{"index": a.Index, "value": a.Value, "valueTwo": a.ValueTwo, "op": a.Op} for a in rule.Args]
        calls.append(call)
    result: Json = {"defaultAction": seccomp.DefaultAction, "syscalls": calls}
    if seccomp.HasField("DefaultErrnoRet"):
        result["defaultErrnoRet"] = seccomp.DefaultErrnoRet
    return result | _present(architectures=list(seccomp.Architectures), flags=list(seccomp.Flags))


def _block_io(block: oci_pb2.LinuxBlockIO) -> Json:
    def throttles(entries: Any) -> list[Json]:
        return [{"major": e.Major, "minor": e.Minor, "rate": e.Rate} for e in entries]

    weights = [
        {"major": e.Major, "minor": e.Minor} | _present(weight=e.Weight, leafWeight=e.LeafWeight)
        for e in block.WeightDevice
    ]
    return _present(
        weight=block.Weight,
        leafWeight=block.LeafWeight,
        weightDevice=weights,
        throttleReadBpsDevice=throttles(block.ThrottleReadBpsDevice),
        throttleWriteBpsDevice=throttles(block.ThrottleWriteBpsDevice),
        throttleReadIOPSDevice=throttles(block.ThrottleReadIOPSDevice),
        throttleWriteIOPSDevice=throttles(block.ThrottleWriteIOPSDevice),
    )


def resources_json(resources: oci_pb2.LinuxResources) -> Json:
    """config.json `linux.resources`, also what `crun update --resources` reads.

    Network classes and kernel memory do not exist in cgroup v2.
    """
    memory, cpu = resources.Memory, resources.CPU
    devices = []
    for rule in resources.Devices:
        entry: Json = {"allow": rule.Allow} | _present(type=rule.Type, access=rule.Access)
        if rule.Major or rule.Minor:  # 0:0 can only mean "any": it is not a device number
            entry |= {"major": rule.Major, "minor": rule.Minor}
        devices.append(entry)
    return _present(
        devices=devices,
        memory=_present(limit=memory.Limit, reservation=memory.Reservation, swap=memory.Swap),
        cpu=_present(
            shares=cpu.Shares,
            quota=cpu.Quota,
            period=cpu.Period,
            burst=cpu.Burst,
            idle=cpu.Idle,
            cpus=cpu.Cpus,
            mems=cpu.Mems,
        ),
        pids=_present(limit=resources.Pids.Limit),
        blockIO=_block_io(resources.BlockIO),
        hugepageLimits=[{"pageSize": h.Pagesize, "limit": h.Limit} for h in resources.HugepageLimits],
        unified=dict(resources.Unified),
    )


def cgroup_path(container_id: str, asked: str) -> str:
    """The container's path below the cgroup root: as requested, or /CONTAINER_ID if that is not usable here (empty, in
    systemd's form slice:prefix:name, or with "..")."""
    if not asked.startswith("/") or ":" in asked or ".." in asked.split("/") or not asked.strip("/"):
        return f"/{container_id}"
    return "/" + "/".join(part for part in asked.split("/") if part and part != ".")


def _namespaces(linux: oci_pb2.Linux, shared: Mapping[str, str]) -> list[Json]:
    """The host's namespace types with the sandbox's paths. Mount, pid and cgroup are always the container's own; the
    last so that it sees its own limits in /sys/fs/cgroup."""
    kinds = [n.Type for n in linux.Namespaces if n.Type not in NAMESPACES_NOT_TAKEN]
    for needed in ("mount", "pid", "cgroup"):
        if needed not in kinds:
            kinds.append(needed)
    return [{"type": kind} | _present(path=shared.get(kind, "")) for kind in dict.fromkeys(kinds)]


def _linux(linux: oci_pb2.Linux, cgroups_path: str, shared: Mapping[str, str]) -> Json:
    resources = resources_json(linux.Resources)
    devices = []
    for device in linux.Devices:
        entry: Json = {"path": device.Path, "type": device.Type, "major": device.Major, "minor": device.Minor}
        devices.append(entry | {"uid": device.UID, "gid": device.GID} | _present(fileMode=device.FileMode & 0o7777))
    if "devices" not in resources:  # the host omits its own rules: crun's defaults, and what was requested
        resources["devices"] = [{"allow": False, "access": "rwm"}] + [
            {"allow": True, "type": d["type"], "major": d["major"], "minor": d["minor"], "access": "rwm"}
            for d in devices
        ]
    mappings = {
        name: [{"hostID": m.HostID, "containerID": m.ContainerID, "size": m.Size} for m in entries]
        for name, entries in (("uidMappings", linux.UIDMappings), ("gidMappings", linux.GIDMappings))
        if entries
    }
    result = {
        "cgroupsPath": cgroups_path,
        "namespaces": _namespaces(linux, shared),
        "resources": resources,
    }
    if linux.HasField("Seccomp") and linux.Seccomp.DefaultAction:
        result["seccomp"] = _seccomp(linux.Seccomp)
    return (
        result
        | mappings
        | _present(
            sysctl=dict(linux.Sysctl),
            devices=devices,
            rootfsPropagation=linux.RootfsPropagation,
            maskedPaths=list(linux.MaskedPaths),
            readonlyPaths=list(linux.ReadonlyPaths),
            mountLabel=linux.MountLabel,
            personality=_present(domain=linux.Personality.Domain, flags=list(linux.Personality.Flags)),
        )
    )


def spec_json(spec: oci_pb2.Spec, rootfs: str, cgroups_path: str, shared: Mapping[str, str]) -> Json:
    """config.json for crun: root at `rootfs`, and the namespaces of `shared` (type to path) joined.

    The hostname belongs to the sandbox's uts namespace if there is one.
    """
    mounts = [
        {"destination": m.destination} | _present(type=m.type, source=m.source, options=list(m.options))
        for m in spec.Mounts
    ]
    result: Json = {
        "ociVersion": "1.0.2",
        "process": process_json(spec.Process),
        "root": {"path": rootfs, "readonly": spec.Root.Readonly},
        "mounts": mounts,
        "linux": _linux(spec.Linux, cgroups_path, shared),
    }
    has_uts = any(n["type"] == "uts" for n in result["linux"]["namespaces"])
    if has_uts and "uts" not in shared and spec.Hostname:
        result["hostname"] = spec.Hostname
    return result | _present(annotations=dict(spec.Annotations), hooks=_hooks(spec.Hooks))
