"""Where the time of a start goes: spans in Chrome's trace format, when KATAPOD_TRACE names a file.

The file is JSON that grows by a line for each event (the format allows the closing bracket to be missing), so
that several processes may write to one, and one that is killed leaves what it had. Open it in Perfetto or
chrome://tracing. Times are microseconds since the epoch: host and guest share that clock.
Source: "Trace Event Format", the document of Chromium's tracing.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

__all__ = ["GUEST", "HOST", "add_span", "enabled", "span", "start_tracing"]

HOST, GUEST = "host", "guest"
VARIABLE = "KATAPOD_TRACE"

_fd = -1
_tracks: dict[str, int] = {}


def start_tracing(*, interpreter: bool = True) -> None:
    """Open the file that KATAPOD_TRACE names, if it names one, and write what happened before this program
    could: the start of its interpreter, unless that was for something else. Raises OSError."""
    global _fd
    path = os.environ.get(VARIABLE, "")
    if not path or _fd >= 0:
        return
    _fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    if os.fstat(_fd).st_size == 0:
        os.write(_fd, b"[\n")
    if interpreter:
        add_span("interpreter", _process_start_ns(), time.time_ns())


def enabled() -> bool:
    return _fd >= 0


@contextlib.contextmanager
def span(name: str, track: str = HOST) -> Iterator[None]:
    """Record how long the block takes. Blocks that run at the same time belong on tracks of their own."""
    if _fd < 0:
        yield
        return
    start_ns = time.time_ns()
    try:
        yield
    finally:
        add_span(name, start_ns, time.time_ns(), track)


def add_span(name: str, start_ns: int, end_ns: int, track: str = HOST) -> None:
    """Record a span that is over: nanoseconds since the epoch."""
    if _fd < 0:
        return
    pid = os.getpid()
    events = []
    if track not in _tracks:
        _tracks[track] = len(_tracks) + 1
        events.append(
            {"name": "thread_name", "ph": "M", "pid": pid, "tid": _tracks[track], "args": {"name": track}},
        )
    events.append(
        {
            "name": name,
            "ph": "X",
            "pid": pid,
            "tid": _tracks[track],
            "ts": start_ns / 1000,
            "dur": (end_ns - start_ns) / 1000,
        }
    )
    os.write(_fd, b"".join(msgspec.json.encode(event) + b",\n" for event in events))


def _process_start_ns() -> int:
    """When this process was made, to a hundredth of a second. Source: proc_pid_stat(5), field 22."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    since_boot_ns = int(fields[19]) * 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    return time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME) + since_boot_ns
