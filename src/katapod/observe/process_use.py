"""What a sandbox's processes use, read fast: a few small files of /proc, for callers that ask every few seconds.

observe/memory_use.py is exact about shared pages, and takes a hundred times as long. Source: proc(5).
"""

import os
from collections.abc import Collection, Iterable
from pathlib import Path

from msgspec import Struct

__all__ = ["ProcessUse", "network_bytes", "process_use"]

CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
_STATUS = (b"RssAnon", b"RssFile", b"RssShmem")
_IO = (b"read_bytes", b"write_bytes")


class ProcessUse(Struct, frozen=True):
    """Processes together. Bytes, but for `cpu_s`; `shared`: of memory files, such as the guest's memory."""

    state: str = ""  # of the first one that lives, as in ps(1)
    cpu_s: float = 0.0
    private: int = 0
    shared: int = 0
    read: int = 0
    written: int = 0


def process_use(pids: Iterable[int], helpers: Collection[int] | None = None) -> ProcessUse:
    """Of those that live.

    `helpers` of the first one count with CPU time and what they read and write, and with what those of them used that
    have ended: it has waited for them. They have no memory of their own: they map its, or share its address space.
    """
    state, ticks, rss, io = "", 0, dict.fromkeys(_STATUS, 0), dict.fromkeys(_IO, 0)
    last_of_cpu = 13 if helpers is None else 15  # utime, stime, cutime, cstime
    for pid in (*pids, *(helpers or ())):
        directory = f"/proc/{pid}/"
        try:
            fields = _content(directory + "stat").rpartition(b")")[2].split()
            if pid not in (helpers or ()):
                _add(rss, _content(directory + "status"))
            _add(io, _content(directory + "io"))
        except (FileNotFoundError, ProcessLookupError):
            continue
        state = state or fields[0].decode()
        ticks += sum(map(int, fields[11:last_of_cpu]))
    return ProcessUse(
        state=state,
        cpu_s=ticks / CLOCK_TICKS,
        private=(rss[b"RssAnon"] + rss[b"RssFile"]) * 1024,
        shared=rss[b"RssShmem"] * 1024,
        read=io[b"read_bytes"],
        written=io[b"write_bytes"],
    )


def _content(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 65536)
    finally:
        os.close(fd)


def _add(sums: dict[bytes, int], text: bytes) -> None:
    for line in text.splitlines():
        key, _, value = line.partition(b":")
        if key in sums:
            sums[key] += int(value.split()[0])


def network_bytes(pid: int) -> tuple[int, int]:
    """(received, sent) by the pod in the network namespace of a process: neither loopback nor the VM's own taps."""
    received = sent = 0
    try:
        lines = Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]
    except OSError:
        return 0, 0
    for line in lines:
        name, _, rest = line.rpartition(":")
        values = rest.split()
        if name.strip() != "lo" and not name.strip().startswith("tap"):
            received += int(values[0])
            sent += int(values[8])
    return received, sent
