"""What a container has written, as its log keeps it: the newest lines, of a file and the one before it.

The format is the CRI's; stdio.LogSink writes it.
"""

import contextlib
import itertools
import os
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from msgspec import Struct

from katapod.host.state import StateStore, supervisor_alive
from katapod.model.errors import NotFound

__all__ = ["LogLine", "read_log"]

POLL_S = 0.2


class LogLine(Struct, frozen=True):
    """`time` as in RFC 3339; `stream`: stdout or stderr; a line that is not `whole` goes on in the next entry."""

    time: bytes
    stream: bytes
    whole: bool
    text: bytes


def read_log(
    store: StateStore,
    name: str,
    *,
    follow: bool = False,
    tail: int | None = None,
    since: bytes = b"",
    until: bytes = b"",
) -> Iterator[LogLine]:
    """The entries of a container's log: the last `tail` of them, or all; with `follow` those to come, too, until it
    ends. `since` and `until`: of that time only, as entries have it. Blocks.

    Raises NotFound, also if the container keeps no log.
    """
    record = store.read(name)
    path = store.layout.sandbox(name).container_log
    if not path.exists():
        if record.auto_remove:
            raise NotFound(f"cannot print the log of {name}: it has none", hint="run it with -d or without --rm")
        return
    with contextlib.ExitStack() as stack:
        current = stack.enter_context(path.open("rb"))
        # texts of one form and one zone: their order is that of time
        lines = itertools.chain(_lines(Path(f"{path}.1")), _whole_lines(current))
        if since or until:
            lines = (line for line in lines if since <= line and (not until or line < until))  # type: ignore[assignment]
        yield from map(_parse, lines if tail is None else deque(lines, maxlen=tail))
        while follow:
            ended = _has_ended(store, name)
            for line in _whole_lines(current):
                if until and line >= until:
                    return
                yield _parse(line)
            if ended:
                break
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ino != os.fstat(current.fileno()).st_ino:  # the log was rotated
                    yield from map(_parse, _whole_lines(current))  # what came before that, after we had read
                    current.close()
                    current = stack.enter_context(path.open("rb"))
                    continue
            time.sleep(POLL_S)


def _has_ended(store: StateStore, name: str) -> bool:
    try:
        record = store.read(name)
        return (record.at_rest and not record.restart_at) or not supervisor_alive(store.layout.sandbox(name))
    except NotFound:
        return True


def _whole_lines(handle: BinaryIO) -> Iterator[bytes]:
    """The lines from where the handle stands; a line that is still being written stays for the next call."""
    while line := handle.readline():
        if not line.endswith(b"\n"):
            handle.seek(-len(line), os.SEEK_CUR)
            return
        yield line


def _lines(*paths: Path) -> Iterator[bytes]:
    for path in paths:
        with contextlib.suppress(FileNotFoundError), path.open("rb") as handle:
            yield from handle


def _parse(line: bytes) -> LogLine:
    """TIME STREAM F|P TEXT."""
    stamp, stream, tag, text = [*line.rstrip(b"\n").split(b" ", 3), b"", b"", b""][:4]
    return LogLine(stamp, stream, tag == b"F", text)
