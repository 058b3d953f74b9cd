"""`kata-runtime logs`: what a container has written."""

import contextlib
import sys
from typing import TYPE_CHECKING

import click

from katapod.cli.command import argument, flag, option, verb
from katapod.cli.settings import Globals, need_root
from katapod.model.errors import KatapodError
from katapod.model.ids import parse_container_name
from katapod.model.plain import plain

if TYPE_CHECKING:
    from katapod.sandbox.container_log import LogLine

__all__ = ["logs"]


@verb("logs")
@argument("name", metavar="NAME", help="Name of a container, running or stopped.")
@flag("-f", "--follow", help="Follow the output until the container exits.")
@option("-n", "--tail", metavar="N", type=click.IntRange(min=0), default=None, help="Print only the last N lines.")
@flag("-t", "--timestamps", help="Begin each line with its time.")
@click.pass_obj
def logs(settings: Globals, name: str, follow: bool, tail: int | None, timestamps: bool) -> None:
    """Print the output of a container: what it wrote to standard output and error, to our own.

    Only the newest 64 MiB are kept. A container that runs in the foreground with --rm has no log.
    """
    need_root("logs")
    from katapod.sandbox.container_log import read_log

    store = settings.states()
    parse_container_name(name)
    try:
        with contextlib.suppress(KeyboardInterrupt) if follow else contextlib.nullcontext():
            for line in read_log(store, name, follow=follow, tail=tail):
                _print(line, timestamps)
    finally:
        with contextlib.suppress(KatapodError):
            record = store.read(name)
            for note in filter(None, (record.log_error, record.error)):
                print(f"kata-runtime: {name}: {plain(note.splitlines()[0])}", file=sys.stderr)


def _print(line: "LogLine", timestamps: bool) -> None:
    out = sys.stderr.buffer if line.stream == b"stderr" else sys.stdout.buffer
    out.write((line.time + b" " if timestamps else b"") + line.text + (b"\n" if line.whole else b""))
    out.flush()
