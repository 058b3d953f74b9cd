"""What a sandbox's processes take of this host, from /proc: memory by part, CPU time.

Source: proc(5), the kernel's Documentation/filesystems/proc.rst for smaps and map_files.
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from katapod.model.overhead import MemoryParts

__all__ = ["Mapping", "ProcessMemory", "cpu_seconds", "family", "memory_parts", "parse_smaps", "read_process"]

PROC = Path("/proc")
GUEST_MEMORY = "/memfd:"  # QEMU and virtiofsd map no other anonymous file
BLOCK_BYTES = 512  # of st_blocks
_RANGE = re.compile(r"([0-9a-f]+-[0-9a-f]+) (\S{4}) \S+ \S+ \d+\s*(.*)")


@dataclass(frozen=True, slots=True)
class Mapping:
    """One entry of smaps."""

    addresses: str  # "start-end" in hex, as its file in map_files is called
    permissions: str
    name: str  # path, "[heap]", or empty for anonymous memory
    pss_kib: int

    @property
    def is_guest_memory(self) -> bool:
        return self.name.startswith(GUEST_MEMORY)


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """One process. `guest_files`: inode of each guest memory file that it maps, and the KiB that the file has."""

    program: str
    mappings: tuple[Mapping, ...]
    guest_files: dict[int, int]

    @property
    def is_qemu(self) -> bool:
        return self.program.startswith("qemu")

    @property
    def is_virtiofsd(self) -> bool:
        return self.program.startswith("virtiofsd")


def parse_smaps(text: str) -> Iterator[Mapping]:
    """Parse /proc/PID/smaps. Each mapping has a line of its range, then lines "Key: value"."""
    head: re.Match[str] | None = None
    for line in text.splitlines():
        if found := _RANGE.fullmatch(line):
            head = found
        elif head is not None and line.startswith("Pss:"):
            yield Mapping(head[1], head[2], head[3], int(line.split()[1]))


def family(roots: Iterable[int]) -> list[int]:
    """The processes `roots` that live, and all below them."""
    children: dict[int, list[int]] = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found: dict[int, None] = {}
    waiting = [pid for pid in roots if _stat(pid)]
    while waiting:
        pid = waiting.pop()
        if pid not in found:
            found[pid] = None
            waiting += children.get(pid, [])
    return list(found)


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on: state, parent, ...; none if it has ended."""
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def cpu_seconds(pids: Iterable[int]) -> float:
    """CPU time that the processes have used so far, user and system."""
    ticks = sum(int(fields[11]) + int(fields[12]) for fields in map(_stat, pids) if fields)
    return ticks / os.sysconf("SC_CLK_TCK")


def read_process(pid: int) -> ProcessMemory | None:
    """None if it has ended. Raises PermissionError: map_files is for root."""
    directory = PROC / str(pid)
    try:
        program = os.path.basename((directory / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace"))
        mappings = tuple(parse_smaps((directory / "smaps").read_text()))
        files = [os.stat(directory / "map_files" / each.addresses) for each in mappings if each.is_guest_memory]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return ProcessMemory(program, mappings, {file.st_ino: file.st_blocks * BLOCK_BYTES // 1024 for file in files})


def memory_parts(processes: Iterable[ProcessMemory]) -> MemoryParts:
    """Sort the memory of a sandbox's processes. Whatever is neither QEMU nor virtiofsd is Katapod's own."""
    sums = dict.fromkeys(("guest", "translated", "heap", "program", "virtiofsd", "owner"), 0)
    guest_files: dict[int, int] = {}
    for process in processes:
        guest_files |= process.guest_files
        for mapping in process.mappings:
            sums[_part(process, mapping)] += mapping.pss_kib
    return MemoryParts(
        guest_mapped_kib=sums["guest"],
        # all who map the guest's memory are here, so their PSS of it adds up to the pages that any of them maps
        guest_unmapped_kib=max(0, sum(guest_files.values()) - sums["guest"]),
        translated_kib=sums["translated"],
        qemu_heap_kib=sums["heap"],
        qemu_program_kib=sums["program"],
        virtiofsd_kib=sums["virtiofsd"],
        owner_kib=sums["owner"],
    )


def _part(process: ProcessMemory, mapping: Mapping) -> str:
    if mapping.is_guest_memory:
        return "guest"
    if process.is_virtiofsd:
        return "virtiofsd"
    if not process.is_qemu:
        return "owner"
    if mapping.permissions.startswith("rwx"):
        return "translated"  # nothing else in QEMU is writable and executable
    return "heap" if not mapping.name or mapping.name.startswith("[") else "program"
