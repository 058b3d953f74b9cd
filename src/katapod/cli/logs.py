"""`kata-runtime logs`: what a container has written."""

import contextlib
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from katapod.cli.command import argument, flag, option, verb
from katapod.cli.settings import Globals, need_root
from katapod.model.errors import KatapodError
from katapod.model.ids import parse_container_name
from katapod.model.plain import plain

if TYPE_CHECKING:
    from katapod.sandbox.container_log import LogLine

__all__ = ["logs", "print_line"]


@verb("logs")
@argument("name", metavar="NAME", help="Name of a container, running or stopped.")
@flag("-f", "--follow", help="Follow the output until the container exits.")
@option("-n", "--tail", metavar="N", default="all", help="Print only the last N lines; default: all.")
@flag("-t", "--timestamps", help="Begin each line with its time.")
@option("--since", metavar="TIME", help="Only from this time on: 2026-11-23T19:50:12Z, 90s, 10m, 1h30m, or seconds.")
@option("--until", metavar="TIME", help="Only up to this time.")
@flag("--details", help="Taken; there are none.")
@flag("--names", help="Taken; there is one container.")
@click.pass_obj
def logs(settings: Globals, /, name: str, follow: bool, timestamps: bool, **flags: Any) -> None:
    """Print the output of a container: what it wrote to standard output and error, to our own.

    Only the newest 64 MiB are kept. A container that runs in the foreground with --rm has no log.
    """
    from katapod.model.log_flags import parse_tail, parse_time

    need_root("logs")
    now = time.time()
    tail = parse_tail(flags["tail"])
    since = parse_time(flags["since"], now, "--since") if flags["since"] else b""
    until = parse_time(flags["until"], now, "--until") if flags["until"] else b""
    from katapod.sandbox.container_log import read_log

    store = settings.states()
    parse_container_name(name)
    try:
        with contextlib.suppress(KeyboardInterrupt) if follow else contextlib.nullcontext():
            for line in read_log(store, name, follow=follow, tail=tail, since=since, until=until):
                print_line(line, timestamps=timestamps)
    finally:
        with contextlib.suppress(KatapodError):
            record = store.read(name)
            for note in filter(None, (record.log_error, record.error)):
                print(f"kata-runtime: {name}: {plain(note.splitlines()[0])}", file=sys.stderr)


def print_line(line: "LogLine", *, timestamps: bool = False) -> None:
    """To the stream that the container wrote it to."""
    out = sys.stderr.buffer if line.stream == b"stderr" else sys.stdout.buffer
    out.write((line.time + b" " if timestamps else b"") + line.text + (b"\n" if line.whole else b""))
    out.flush()
