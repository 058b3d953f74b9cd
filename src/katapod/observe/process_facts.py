"""Processes of this host as inspect shows them. Reads /proc."""

import os
from collections.abc import Iterable

from katapod.host.memory_use import family
from katapod.model.inspection import Process

__all__ = ["is_alive", "process_facts", "sandbox_processes"]

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
THREADS_MAX = 256
PROCESSES_MAX = 256


def sandbox_processes(owner: int, vmm: int) -> tuple[Process, ...]:
    """The owner and all below it, and QEMU."""
    pids = sorted({*family([owner]), *(family([vmm]) if vmm else ())})[:PROCESSES_MAX]
    return tuple(found for pid in pids if (found := process_facts(pid, owner, vmm)) is not None)


def is_alive(pid: int) -> bool:
    """A zombie is not."""
    try:
        with open(f"/proc/{pid}/stat") as handle:
            return handle.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def process_facts(pid: int, owner: int, vmm: int) -> Process | None:
    """None if it has ended."""
    directory = f"/proc/{pid}"
    try:
        with open(f"{directory}/cmdline", "rb") as handle:
            command = handle.read().rstrip(b"\0").decode(errors="replace").split("\0")
        with open(f"{directory}/stat") as handle:
            head, _, rest = handle.read().rpartition(")")
        fields = rest.split()
        user = os.stat(directory).st_uid
        threads = tuple(_threads(directory))
    except (OSError, UnicodeDecodeError):
        return None
    if fields[0] in ("Z", "X"):
        return None
    words = command if command[0] else [f"[{head.partition('(')[2]}]"]
    return Process(
        pid=pid,
        parent=int(fields[1]),
        role=_role(pid, words, owner, vmm),
        command=tuple(words),
        state=fields[0],
        user=user,
        rss=max(0, int(fields[21])) * PAGE_BYTES,
        cpu_seconds=(int(fields[11]) + int(fields[12])) / CLOCK_TICKS,
        threads=threads,
    )


def _role(pid: int, words: list[str], owner: int, vmm: int) -> str:
    if pid == vmm:
        return "qemu"
    if pid == owner:
        return "shim" if any(os.path.basename(word) == "containerd-shim-kata-v2" for word in words[:3]) else "owner"
    return "virtiofsd" if os.path.basename(words[0]).startswith("virtiofsd") else "other"


def _threads(directory: str) -> Iterable[tuple[int, str]]:
    for name in sorted(os.listdir(f"{directory}/task"), key=int)[:THREADS_MAX]:
        try:
            with open(f"{directory}/task/{name}/comm") as handle:
                yield int(name), handle.read().strip()
        except OSError:
            continue
