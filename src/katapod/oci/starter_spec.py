"""The config.json that `spec` writes: a shell with a terminal, confined as engines do it. Pure.

Source: OCI runtime-spec, config.md and config-linux.md (Default Filesystems).
"""

from typing import Any

from katapod.version import OCI_VERSION

__all__ = ["starter_spec"]

CAPABILITIES = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]
MASKED = ["/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list"]
MASKED += ["/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi"]
READ_ONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]


def starter_spec(*, rootless: bool) -> dict[str, Any]:
    """`rootless`: for a user who is mapped to root in a user namespace of the container's."""
    namespaces = [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount", "cgroup")]
    linux: dict[str, Any] = {
        "resources": {"devices": [{"allow": False, "access": "rwm"}]},
        "namespaces": namespaces,
        "maskedPaths": MASKED,
        "readonlyPaths": READ_ONLY,
    }
    if rootless:
        namespaces.append({"type": "user"})
        mapping = {"containerID": 0, "hostID": 0, "size": 1}
        linux |= {"uidMappings": [mapping], "gidMappings": [mapping]}
        del linux["resources"]
    return {
        "ociVersion": OCI_VERSION,
        "process": {
            "terminal": True,
            "user": {"uid": 0, "gid": 0},
            "args": ["sh"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), CAPABILITIES),
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs", "readonly": True},
        "hostname": "runc",
        "mounts": _mounts(),
        "linux": linux,
    }


def _mounts() -> list[dict[str, Any]]:
    rows = (
        ("/proc", "proc", "proc", ()),
        ("/dev", "tmpfs", "tmpfs", ("nosuid", "strictatime", "mode=755", "size=65536k")),
        ("/dev/pts", "devpts", "devpts", ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5")),
        ("/dev/shm", "tmpfs", "shm", ("nosuid", "noexec", "nodev", "mode=1777", "size=65536k")),  # noqa: S108
        ("/dev/mqueue", "mqueue", "mqueue", ("nosuid", "noexec", "nodev")),
        ("/sys", "sysfs", "sysfs", ("nosuid", "noexec", "nodev", "ro")),
        ("/sys/fs/cgroup", "cgroup", "cgroup", ("nosuid", "noexec", "nodev", "relatime", "ro")),
    )
    return [
        {"destination": place, "type": kind, "source": source, **({"options": list(options)} if options else {})}
        for place, kind, source, options in rows
    ]
