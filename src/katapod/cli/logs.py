"""`kata-runtime logs`: what a container has written."""

import contextlib
import itertools
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import click

from katapod.cli.command import argument, flag, option, verb
from katapod.cli.settings import Globals, need_root
from katapod.model.errors import KatapodError, NotFound
from katapod.model.ids import parse_container_name
from katapod.model.plain import plain

if TYPE_CHECKING:
    from katapod.host.state import StateStore

__all__ = ["logs"]

POLL_S = 0.2


@verb("logs")
@argument("name", metavar="NAME", help="A container, running or stopped.")
@flag("-f", "--follow", help="Go on until the container ends.")
@option("-n", "--tail", metavar="N", type=click.IntRange(min=0), default=None, help="Only the last N lines.")
@flag("-t", "--timestamps", help="Begin lines with their time.")
@click.pass_obj
def logs(settings: Globals, name: str, follow: bool, tail: int | None, timestamps: bool) -> None:
    """Print what a container has written, its two streams to the same two here.

    Kept are the newest 64 MiB. A container run with --rm and in the foreground keeps no log.
    """
    need_root("logs")
    store = settings.states()
    parse_container_name(name)
    try:
        _print_log(store, name, follow, tail, timestamps)
    finally:
        with contextlib.suppress(KatapodError):
            record = store.read(name)
            for note in filter(None, (record.log_error, record.error)):
                print(f"kata-runtime: {name}: {plain(note.splitlines()[0])}", file=sys.stderr)


def _print_log(store: "StateStore", name: str, follow: bool, tail: int | None, timestamps: bool) -> None:
    from katapod.host.state import owner_alive
    from katapod.model.record import State

    record = store.read(name)
    path = store.layout.sandbox(name).container_log
    older = Path(f"{path}.1")
    if not path.exists():
        if record.auto_remove:
            raise NotFound(f"cannot print the log of {name}: it keeps none", hint="run it with -d or without --rm")
        return
    with contextlib.ExitStack() as stack:
        current = stack.enter_context(path.open("rb"))
        lines = itertools.chain(_lines(older), _whole_lines(current))
        for line in lines if tail is None else deque(lines, maxlen=tail):
            _print(line, timestamps)
        if not follow:
            return
        stack.enter_context(contextlib.suppress(KeyboardInterrupt))
        while True:
            try:
                ended = store.read(name).state is State.STOPPED or not owner_alive(store.layout.sandbox(name))
            except NotFound:
                ended = True
            for line in _whole_lines(current):
                _print(line, timestamps)
            if ended:
                break
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ino != os.fstat(current.fileno()).st_ino:  # the log was rotated, we have read the old
                    current = stack.enter_context(path.open("rb"))
                    continue
            time.sleep(POLL_S)


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


def _print(line: bytes, timestamps: bool) -> None:
    """One line of the log: TIME STREAM F|P TEXT; see sandbox.stdio.LogSink."""
    stamp, stream, tag, text = [*line.rstrip(b"\n").split(b" ", 3), b"", b"", b""][:4]
    out = sys.stderr.buffer if stream == b"stderr" else sys.stdout.buffer
    out.write((stamp + b" " if timestamps else b"") + text + (b"\n" if tag == b"F" else b""))
    out.flush()
