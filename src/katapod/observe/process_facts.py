"""Processes of this host as inspect shows them. Reads /proc."""

import os
from collections.abc import Collection, Iterable

from katapod.model.inspection import Process
from katapod.observe.confinement import confinement_of
from katapod.observe.memory_use import DISK_SERVER, family

__all__ = ["is_alive", "process_facts", "sandbox_processes"]

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
THREADS_MAX = 256
PROCESSES_MAX = 256


def sandbox_processes(supervisor: int, vmm: int) -> tuple[Process, ...]:
    """The supervisor and all below it, and the VMM. A guest of User-mode Linux may have any number of helpers: these
    are the first to be left out, and the two never are."""
    first = [supervisor, *([vmm] if vmm else [])]
    helpers = set(family([vmm])) - {vmm} if vmm else set()
    others = set(family([supervisor])) - helpers - set(first)
    pids = [*first, *sorted(others), *sorted(helpers)][:PROCESSES_MAX]
    found = (process_facts(pid, _role(pid, supervisor, vmm, helpers)) for pid in sorted(pids))
    return tuple(each for each in found if each is not None)


def is_alive(pid: int) -> bool:
    """A zombie is not."""
    try:
        with open(f"/proc/{pid}/stat") as handle:
            return handle.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def process_facts(pid: int, role: str) -> Process | None:
    """None if it has ended. `role`: empty for what its command line tells."""
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
    if role == "supervisor" and any(os.path.basename(word) == "containerd-shim-kata-v2" for word in words[:3]):
        role = "shim"
    return Process(
        pid=pid,
        parent=int(fields[1]),
        role=role or _role_by_name(words),
        command=tuple(words),
        state=fields[0],
        user=user,
        rss=max(0, int(fields[21])) * PAGE_BYTES,
        cpu_seconds=(int(fields[11]) + int(fields[12])) / CLOCK_TICKS,
        threads=threads,
        confinement=confinement_of(pid),
    )


def _role(pid: int, supervisor: int, vmm: int, helpers: Collection[int]) -> str:
    if pid == vmm:
        return "vmm"
    if pid in helpers:
        return "vmm-helper"
    return "supervisor" if pid == supervisor else ""


def _role_by_name(words: list[str]) -> str:
    program = os.path.basename(words[0])
    if words[0].startswith(DISK_SERVER):
        return "storage"
    return "virtiofsd" if program.startswith("virtiofsd") else "other"


def _threads(directory: str) -> Iterable[tuple[int, str]]:
    for name in sorted(os.listdir(f"{directory}/task"), key=int)[:THREADS_MAX]:
        try:
            with open(f"{directory}/task/{name}/comm") as handle:
                yield int(name), handle.read().strip()
        except OSError:
            continue
