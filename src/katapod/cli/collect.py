"""`kata-runtime collect-data`: one file for a bug report. kata-collect-data.sh calls it."""

import os
import sys
from pathlib import Path

import click

from katapod.cli.command import HOST_PATH, option, verb
from katapod.cli.interrupt import interruptible
from katapod.cli.settings import Globals, need_root
from katapod.model.errors import KatapodError, UsageError

__all__ = ["collect_data"]

PROBLEM_LIMIT, PROBLEM_LIMIT_MAX = 50, 10000


@verb("collect-data")
@option("-o", "--output", metavar="FILE", type=HOST_PATH, help="Write to FILE; default: standard output.")
@click.pass_obj
def collect_data(settings: Globals, output: str) -> int:
    """Collect the data for a bug report, as Markdown: versions, configuration, logs, sandboxes, the output of check.

    Passwords, tokens, keys and container environments are left out as far as they are recognized; read the report
    before you publish it. The variable PROBLEM_LIMIT sets how many lines of each log are kept, 50 by default.
    """
    need_root("collect-data")
    text = os.environ.get("PROBLEM_LIMIT", "") or str(PROBLEM_LIMIT)
    if not text.isascii() or not text.isdigit() or int(text[:9]) > PROBLEM_LIMIT_MAX:
        raise UsageError(f"cannot use PROBLEM_LIMIT={text[:40]}: it must be a number from 0 to {PROBLEM_LIMIT_MAX}")
    target = Path(output) if output else None
    if target is not None and (target.is_dir() or not target.absolute().parent.is_dir()):
        raise UsageError(f"cannot write {output}: it is a directory, or its directory does not exist")

    async def go() -> int:
        from katapod.host.state import write_atomically
        from katapod.observe.collect import collect_parts, render

        report = render([part async for part in collect_parts(settings.layout, int(text))])
        if target is None:
            sys.stdout.write(report)
            return 0
        try:
            write_atomically(target, report.encode())
        except OSError as exc:
            raise KatapodError(f"cannot write {output}: {exc.strerror}") from exc
        print(f"written to {output}; read it before you publish it", file=sys.stderr)
        return 0

    return interruptible(go())
