"""What happens to containers, as lines of JSON in one file of this host: whoever does it writes it there.

The newest EVENT_BYTES are kept, in two files. A line that cannot be written is no reason to fail: nothing is raised.
"""

import contextlib
import fcntl
import itertools
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec import Struct

from katapod.model.json_text import decode_json, encode_json
from katapod.model.layout import Layout
from katapod.model.record import SandboxRecord

__all__ = ["Event", "note_event", "read_events"]

log = logging.getLogger(__name__)

EVENT_BYTES = 1 << 20
LINE_MAX = 1 << 16  # labels may be long
POLL_S = 0.2


class Event(Struct, frozen=True, forbid_unknown_fields=True):
    """`action` is docker's word for it; `labels` are the container's, `more` is what belongs to the action."""

    time_ns: int
    action: str
    container: str
    image: str = ""
    labels: dict[str, str] = {}
    more: dict[str, str] = {}


def note_event(layout: Layout, action: str, record: SandboxRecord, **more: object) -> None:
    """Of a container of `run` or `create`; what belongs to an engine's pod or to the pool is the engine's to tell."""
    if record.pod or record.pooled:
        return
    image = record.containers[0].image if record.containers else ""
    words = {name: str(value) for name, value in more.items()}
    event = Event(time.time_ns(), action, record.sandbox_id, image, record.labels, words)
    line = encode_json(event)
    if len(line) > LINE_MAX:
        line = encode_json(msgspec.structs.replace(event, labels={}))
    try:
        _append(layout.event_log, line + b"\n")
    except OSError as exc:
        log.info("event %s of %s is not on record: %s", action, record.sandbox_id, exc.strerror)


def _append(path: Path, line: bytes) -> None:
    while True:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)  # held for one write
            status = os.fstat(fd)
            if not _is(path, status):
                continue  # another one has begun a new file meanwhile
            if status.st_size + len(line) > EVENT_BYTES // 2 and status.st_size:
                os.replace(path, f"{path}.1")
                continue
            os.write(fd, line)
            return
        finally:
            os.close(fd)


def _is(path: Path, status: os.stat_result) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path), status)
    return False


def read_events(layout: Layout, *, follow_until: float | None = 0.0) -> Iterator[Event | None]:
    """Those on record, oldest first; then those to come, until time.time() is `follow_until`, None: for ever. Yields
    None where it has nothing more to tell for now. Lines that are no events are passed over. Blocks."""
    path = layout.event_log
    with contextlib.ExitStack() as stack:
        place = -1

        def lines() -> Iterator[bytes]:
            nonlocal place
            if place < 0:
                with contextlib.suppress(FileNotFoundError), open(f"{path}.1", "rb") as older:
                    yield from older
                with contextlib.suppress(FileNotFoundError):
                    place = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                    stack.callback(lambda: os.close(place))
            yield from _whole_lines(place)
            if place >= 0 and not _is(path, os.fstat(place)):
                yield from _whole_lines(place)  # what came before it was rotated
                with contextlib.suppress(FileNotFoundError):
                    fresh = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                    os.close(place)
                    place = fresh
                    yield from _whole_lines(place)

        for _ in itertools.count():
            for line in lines():
                with contextlib.suppress(msgspec.DecodeError):
                    yield decode_json(line, Event)
            yield None
            if follow_until is not None and time.time() >= follow_until:
                return
            time.sleep(POLL_S)


def _whole_lines(fd: int) -> Iterator[bytes]:
    """From where the descriptor stands; a line that is still being written stays for the next call."""
    if fd < 0:
        return
    data = b""
    while piece := os.read(fd, 1 << 16):
        data += piece
    whole, newline, rest = data.rpartition(b"\n")
    if rest:
        os.lseek(fd, -len(rest), os.SEEK_CUR)
    if newline:
        yield from whole.split(b"\n")
