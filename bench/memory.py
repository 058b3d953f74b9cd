"""Proportional set size (PSS) of a running container: pages shared by n processes count 1/n for each."""

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path

from bench.contestants import Contestant, Katapod, Peer
from bench.measure import BenchError
from katapod.kernel.process import share_memory

__all__ = ["KATAPOD_PARTS", "descendants", "part_of", "pss_mib_by_part"]

KATAPOD_PARTS = ("QEMU", "User-mode Linux", "virtiofsd", "qemu-storage-daemon", "kata-runtime")
PROC = Path("/proc")


def parse_pss_mib(text: str) -> float:
    """From /proc/PID/smaps_rollup, in KiB there. 0 if the process has no memory of its own any more."""
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")) / 1024


def parents() -> dict[int, int]:
    """Process -> its parent, of all processes."""
    found = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            try:
                after_name = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has just ended
            found[int(entry.name)] = int(after_name[1])
    return found


def descendants(roots: Iterable[int], parent_of: dict[int, int]) -> set[int]:
    """The processes themselves and all below them."""
    family = set(roots)
    while more := {pid for pid, parent in parent_of.items() if parent in family and pid not in family}:
        family |= more
    return family


def _command(pid: int) -> list[str]:
    try:
        return (PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _katapod_roots(contestant: Katapod, name: str) -> set[int]:
    listed = subprocess.run(contestant.call("list", "--json"), capture_output=True, check=True).stdout
    for record in json.loads(listed):
        if record["name"] == name:
            return {record["supervisor_pid"], record["vmm_pid"]}
    raise BenchError(f"{contestant.name}: {name} is not in its list")


def _peer_roots(contestant: Peer, name: str) -> set[int]:
    """The container's first process. runsc's gofer is no child of its sandbox: its command line names our --root."""
    first = int(contestant.pid_file(name).read_text())
    if contestant.program != "runsc":
        return {first}
    state = f"--root={contestant.state}"
    return {first, *(pid for pid in parents() if state in _command(pid))}


_PARTS = (
    ("linux.uml", "User-mode Linux"),
    ("qemu-system", "QEMU"),
    ("qemu-storage-daemon", "qemu-storage-daemon"),
    ("virtiofsd", "virtiofsd"),
)


def part_of(program: str) -> str:
    """Of Katapod, by the first word of a command line; some name the directory of their machine there, too."""
    name = Path(program.partition(" /")[0]).name
    return next((part for start, part in _PARTS if name.startswith(start)), "kata-runtime")


def _part(pid: int) -> str:
    command = _command(pid)
    return part_of(command[0] if command else "")


def pss_mib_by_part(contestant: Contestant, name: str) -> dict[str, float]:
    """MiB of all processes of the container and of what serves it; parts of Katapod apart, of peers in one."""
    if isinstance(contestant, Katapod):
        roots = _katapod_roots(contestant, name)
    elif isinstance(contestant, Peer):
        roots = _peer_roots(contestant, name)
    else:
        raise TypeError(type(contestant))
    parts: dict[str, float] = {}
    parent_of = parents()
    family = descendants(roots, parent_of)
    for pid in family:
        try:
            # a helper of User-mode Linux has its kernel's address space: the same pages once more
            if parent_of.get(pid) in family and share_memory(parent_of[pid], pid):
                continue
            size = parse_pss_mib((PROC / str(pid) / "smaps_rollup").read_text())
        except OSError:
            continue  # it has just ended
        part = _part(pid) if isinstance(contestant, Katapod) else contestant.program
        parts[part] = parts.get(part, 0.0) + size
    if not parts:
        raise BenchError(f"{contestant.name}: {name} has no processes")
    return parts
