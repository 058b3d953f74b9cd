"""What a sandbox's processes take of this host, from /proc: memory by part, CPU time.

Source: proc(5), the kernel's Documentation/filesystems/proc.rst for smaps and map_files.
"""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from msgspec import Struct

from katapod.kernel.process import share_memory
from katapod.model.overhead import MemoryParts

__all__ = [
    "DISK_SERVER",
    "Mapping",
    "ProcessMemory",
    "cpu_seconds",
    "family",
    "is_disk_server",
    "memory_parts",
    "parse_smaps",
    "read_process",
    "read_processes",
]

PROC = Path("/proc")
GUEST_MEMORY = ("/memfd:", "/tmp/")  # of QEMU; of User-mode Linux, in its jail  # noqa: S108
DISK_SERVER = "qemu-storage-daemon"  # how its command line begins
BLOCK_BYTES = 512  # of st_blocks
_RANGE = re.compile(r"([0-9a-f]+-[0-9a-f]+) (\S{4}) \S+ (\S+) (\d+)\s*(.*)")


class Mapping(Struct, frozen=True):
    """One entry of smaps."""

    addresses: str  # "start-end" in hex, as its file in map_files is called
    permissions: str
    name: str  # path, "[heap]", or empty for anonymous memory
    pss_kib: int
    file: tuple[str, int] = ("00:00", 0)  # device and inode

    @property
    def is_guest_memory(self) -> bool:
        return self.permissions.endswith("s") and self.name.startswith(GUEST_MEMORY)


class ProcessMemory(Struct, frozen=True):
    """One process. `guest_files`: inode of each guest memory file that it maps, and the KiB that the file has.
    `of_vmm`: it is the VMM, or was started by it."""

    program: str
    mappings: tuple[Mapping, ...]
    guest_files: dict[int, int]
    of_vmm: bool = False

    @property
    def is_virtiofsd(self) -> bool:
        return self.program.startswith("virtiofsd")

    @property
    def is_disk_server(self) -> bool:
        return self.program.startswith(DISK_SERVER)


def parse_smaps(text: str) -> Iterator[Mapping]:
    """Parse /proc/PID/smaps. Each mapping has a line of its range, then lines "Key: value"."""
    head: re.Match[str] | None = None
    for line in text.splitlines():
        if found := _RANGE.fullmatch(line):
            head = found
        elif head is not None and line.startswith("Pss:"):
            yield Mapping(head[1], head[2], head[5], int(line.split()[1]), (head[3], int(head[4])))


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


def is_disk_server(pid: int) -> bool:
    """Whether it is qemu-storage-daemon; not if it has ended."""
    try:
        return _program(pid).startswith(DISK_SERVER)
    except OSError:
        return False


def _program(pid: int) -> str:
    """The name of its program, by its command line: the directory of its machine may follow. Raises OSError."""
    first = (PROC / str(pid) / "cmdline").read_bytes().partition(b"\0")[0].decode(errors="replace")
    return os.path.basename(first.partition(" /")[0])


def cpu_seconds(pids: Iterable[int], *, with_ended: bool = False) -> float:
    """CPU time that the processes have used so far, user and system; on request with that of their children that have
    ended and been waited for."""
    last = 15 if with_ended else 13  # utime, stime, cutime, cstime
    ticks = sum(int(ticks) for pid in pids for ticks in _stat(pid)[11:last])
    return ticks / os.sysconf("SC_CLK_TCK")


def read_processes(pids: Iterable[int], vmm: int) -> list[ProcessMemory]:
    """Those that live; `vmm` is the VMM's. A helper that shares the VMM's address space is left out: its pages are the
    VMM's, and its smaps tell them once more. Raises PermissionError: map_files is for root."""
    of_vmm = set(family([vmm])) if vmm else set()
    found = []
    for pid in pids:
        try:
            if pid in of_vmm and pid != vmm and share_memory(vmm, pid):
                continue
        except ProcessLookupError:
            continue
        if (process := read_process(pid, of_vmm=pid in of_vmm)) is not None:
            found.append(process)
    return found


def read_process(pid: int, *, of_vmm: bool = False) -> ProcessMemory | None:
    """None if it has ended. Raises PermissionError."""
    directory = PROC / str(pid)
    try:
        program = _program(pid)
        mappings = tuple(parse_smaps((directory / "smaps").read_text()))
        # User-mode Linux maps its file a thousand times, a few pages each
        once = {each.file: each.addresses for each in mappings if each.is_guest_memory}
        files = [os.stat(directory / "map_files" / addresses) for addresses in once.values()]
    except (FileNotFoundError, ProcessLookupError):
        return None
    sizes = {file.st_ino: file.st_blocks * BLOCK_BYTES // 1024 for file in files}
    return ProcessMemory(program, mappings, sizes, of_vmm)


def memory_parts(processes: Iterable[ProcessMemory], *, emulated: bool) -> MemoryParts:
    """Sort the memory of a sandbox's processes. What neither belongs to the VMM nor serves its files and disks is
    Katapod's own."""
    sums = dict.fromkeys(("guest", "translated", "heap", "program", "virtiofsd", "disks", "supervisor"), 0)
    guest_files: dict[int, int] = {}
    for process in processes:
        guest_files |= process.guest_files
        for mapping in process.mappings:
            sums[_part(process, mapping, emulated)] += mapping.pss_kib
    return MemoryParts(
        guest_mapped_kib=sums["guest"],
        # all who map the guest's memory are here, so their PSS of it adds up to the pages that any of them maps
        guest_unmapped_kib=max(0, sum(guest_files.values()) - sums["guest"]),
        translated_kib=sums["translated"],
        vmm_heap_kib=sums["heap"],
        vmm_program_kib=sums["program"],
        virtiofsd_kib=sums["virtiofsd"],
        disk_server_kib=sums["disks"],
        supervisor_kib=sums["supervisor"],
    )


def _part(process: ProcessMemory, mapping: Mapping, emulated: bool) -> str:
    if mapping.is_guest_memory:
        return "guest"
    if process.is_virtiofsd:
        return "virtiofsd"
    if process.is_disk_server:
        return "disks"
    if not process.of_vmm:
        return "supervisor"
    if emulated and mapping.permissions.startswith("rwx"):
        return "translated"  # nothing else in QEMU is writable and executable
    return "heap" if not mapping.name or mapping.name.startswith("[") else "program"
