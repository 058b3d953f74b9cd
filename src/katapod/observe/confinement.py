"""What keeps a process of this host from the rest of it, as the kernel says: /proc/PID/status and /proc/PID/ns."""

import os

from katapod.model.inspection import Confinement

__all__ = ["confinement_of"]

NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
STATUS_MAX = 64 * 1024


def confinement_of(pid: int) -> Confinement | None:
    """None if it has ended, or hides it from us. Source: proc_pid_status(5)."""
    try:
        with open(f"/proc/{pid}/status") as handle:
            lines = dict(line.split(":\t", 1) for line in handle.read(STATUS_MAX).splitlines() if ":\t" in line)
        mask = int(lines["CapPrm"], 16)
        if lines.get("NoNewPrivs") != "1":
            mask |= int(lines["CapBnd"], 16)
        return Confinement(
            capabilities=tuple(number for number in range(64) if mask >> number & 1),
            no_new_privileges=lines.get("NoNewPrivs") == "1",
            seccomp=lines.get("Seccomp", "0") != "0",
            namespaces=tuple(name for name in NAMESPACES if _namespace(pid, name) != _host_namespace(name)),
        )
    except (OSError, KeyError, ValueError):
        return None


def _namespace(pid: int, name: str) -> str:
    return os.readlink(f"/proc/{pid}/ns/{name}")


def _host_namespace(name: str) -> str:
    """That of process 1; in a container whose process 1 hides it from us, our own."""
    try:
        return _namespace(1, name)
    except OSError:
        return os.readlink(f"/proc/self/ns/{name}")
