"""Where the time of a start goes: spans in Chrome's trace format, when KATAPOD_TRACE names a file.

The file is closed JSON after each event, which is a line: written over the end, in one call and under a lock. So
several processes may write to one, and one that is killed leaves what it had. Open it in Perfetto or chrome://tracing.
What is no regular file, such as a pipe, gets the lines one after another; viewers take that as well. Times are
microseconds since the epoch: host and guest share that clock.
Source: "Trace Event Format", the document of Chromium's tracing.
"""

import contextlib
import errno
import fcntl
import os
import stat
import threading
import time
from collections.abc import Iterator

__all__ = ["GUEST", "HOST", "add_span", "enabled", "span", "start_tracing"]

HOST, GUEST = "host", "guest"
VARIABLE = "KATAPOD_TRACE"

HEAD, END = b"[", b"\n]\n"
TAIL_MAX = 1 << 20  # bytes looked at for the last whole line of a file that was cut off

_fd = -1
_lock = threading.Lock()
_tracks: dict[str, int] = {}


def start_tracing(*, interpreter: bool = True) -> None:
    """Open the file that KATAPOD_TRACE names, if it names one, and write what happened before this program
    could: the start of its interpreter, unless that was for something else. Raises OSError."""
    global _fd
    path = os.environ.get(VARIABLE, "")
    if not path or _fd >= 0:
        return
    try:
        _fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        _fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)  # what can only be written
    try:
        _write([])
    except OSError:
        os.close(_fd)
        _fd = -1
        raise
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
    import msgspec  # here, because every program imports this module and few are traced

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
    _write([msgspec.json.encode(event) for event in events])


def _write(events: list[bytes]) -> None:
    """Lines at the end of what is there, which is closed again."""
    if not stat.S_ISREG(os.fstat(_fd).st_mode):
        os.write(_fd, b"".join(event + b",\n" for event in events))
        return
    with _lock:
        fcntl.lockf(_fd, fcntl.LOCK_EX)  # not flock: that is one for all processes that inherited the descriptor
        try:
            end = _end_of_events()
            first = b"\n" if end == len(HEAD) else b",\n"
            lines = first + b",\n".join(events) if events else b""
            os.pwrite(_fd, (HEAD if end == len(HEAD) else b"") + lines + END, 0 if end == len(HEAD) else end)
        finally:
            fcntl.lockf(_fd, fcntl.LOCK_UN)


def _end_of_events() -> int:
    """Where the next goes. What was cut off after it, as by a full disk, is cut away."""
    size = os.fstat(_fd).st_size
    start = max(0, size - TAIL_MAX)
    tail = os.pread(_fd, TAIL_MAX, start)
    if tail.endswith(END):
        return size - len(END)
    if size and os.pread(_fd, 1, 0) != HEAD:
        raise FileExistsError(errno.EEXIST, "the file exists and is not a trace", os.environ.get(VARIABLE))
    last = max(tail.rfind(b"}\n"), tail.rfind(b"},\n"))
    end = start + last + 1 if last >= 0 else len(HEAD)
    os.ftruncate(_fd, end)
    return end


def _process_start_ns() -> int:
    """When this process was made, to a hundredth of a second. Source: proc_pid_stat(5), field 22."""
    with open("/proc/self/stat") as handle:
        fields = handle.read().rpartition(")")[2].split()
    since_boot_ns = int(fields[19]) * 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    return time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME) + since_boot_ns
