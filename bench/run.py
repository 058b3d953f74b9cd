"""`make bench`: measure, print, and write build/bench.json and build/bench/.

Each round lets every contestant do everything once, so that what disturbs the machine disturbs all of them alike.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bench.contestants import PEERS
from bench.machine import Machine, describe_machine
from bench.measure import BenchError
from bench.plots import chart
from bench.raw_boot import CACHE
from bench.rows import Board, Metric, Row, rows_of
from bench.setting import prepared
from bench.suites import RAW, Stage, Suite, all_suites
from bench.table import print_results

__all__ = ["Options", "main", "selected"]

INITRD = Metric("guest initrd", "MB", budgets={"Katapod": 19.7})
STARTS = (
    'Starts are measured without a network but those of "Katapod default", which is what `run` does without flags,\n'
    "and of pods of the CRI."
)


@dataclass(frozen=True, slots=True)
class Options:
    rounds: int
    only: re.Pattern[str]
    full: bool
    accelerator: str


def selected(suite: Suite, options: Options) -> list[str]:
    """The contestants of the suite that take part: those of whom a row's name matches, and whom their ratios need."""
    if suite.extra and not options.full:
        return []
    wanted = [
        (metric, who)
        for metric in suite.metrics
        for who in suite.contestants
        if options.only.search(f"{suite.group}: {metric.title}, {who}")
    ]
    needed = {metric.base[1] for metric, _ in wanted if metric.base}
    needed |= {metric.against[who][0] for metric, who in wanted if who in metric.against}
    chosen = {who for _, who in wanted} | needed
    if suite.group == "boot":
        chosen.add(RAW[1])
    return [who for who in suite.contestants if who in chosen]


def _measure(
    stage: Stage, suites: Sequence[tuple[Suite, list[str]]], options: Options, board: Board, say: Console
) -> None:
    for number in range(options.rounds):
        for suite, names in suites:
            if suite.rounds is not None and number >= suite.rounds:
                continue
            began = time.monotonic()
            for metric, who, value in suite.measure(stage, names, number):
                board.record(suite.group, metric, who, number, value)
            say.print(
                f"  round {number + 1} of {options.rounds}: {suite.group}, {time.monotonic() - began:.0f} s",
                highlight=False,
            )
    size = (CACHE / "kata-containers-initrd.img").stat().st_size / 1e6
    if options.only.search(INITRD.title):
        board.record("size", INITRD, "Katapod", 0, size)


def _titles() -> dict[str, str]:
    titles = {suite.group: f"{suite.group}: {suite.about}" for suite in all_suites()}
    return titles | {"size": "size: what lies on the host"}


def _write(rows: Sequence[Row], machine: Machine, notes: dict[str, object], output: Path) -> None:
    """The rows, and beside them the machine and a chart for each group."""
    folder = output.parent / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    output.write_text("[\n" + ",\n".join(json.dumps(row.to_json()) for row in rows) + "\n]\n")
    (folder / "machine.json").write_text(json.dumps({"machine": machine.to_json(), **notes}, indent=1) + "\n")
    for old in folder.glob("*.svg"):
        old.unlink()
    for group, title in _titles().items():
        if found := [row for row in rows if row.group == group and " against " not in row.metric]:
            (folder / f"{group.replace(' ', '-')}.svg").write_text(chart(title, found, machine.lines()))


def _interrupt_once(number: int, frame: object) -> None:
    """The first signal ends the measuring; those that follow must not disturb the cleaning up."""
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(one, signal.SIG_IGN)
    raise KeyboardInterrupt


def _parse() -> tuple[Options, Path, Path | None]:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="default: 5; slow suites take part in the first ones")
    parser.add_argument("--only", default="", metavar="PATTERN", help="regular expression: rows whose name has it")
    parser.add_argument("--full", action="store_true", help="also what takes minutes")
    parser.add_argument("--accel", choices=("tcg", "kvm"), default="tcg")
    parser.add_argument("--output", type=Path, default=Path("build/bench.json"))
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="write the results there too, as a baseline")
    given = parser.parse_args()
    try:
        only = re.compile(given.only, re.IGNORECASE)
    except re.error as error:
        parser.error(f"--only {given.only}: {error}")
    if given.rounds < 1:
        parser.error("--rounds must be at least 1")
    return Options(given.rounds, only, given.full, given.accel), given.output, given.baseline


def main() -> int:
    options, output, baseline = _parse()
    os.environ.pop("KATAPOD_NETWORK", None)  # contestants say what they want; the default one has what a user gets
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt_once)
    console = Console(width=None if sys.stdout.isatty() else 140)
    say = Console(stderr=True)
    began = time.monotonic()
    missing: dict[str, str] = {}
    board = Board()
    machine = describe_machine(options.accelerator)
    suites = [(suite, names) for suite in all_suites() if (names := selected(suite, options))]
    failures: list[str] = []
    status = 0
    try:
        wanted = {name for _, names in suites for name in names}
        with prepared(options.accelerator, wanted, missing) as stage:
            failures = stage.failures
            _measure(stage, suites, options, board, say)
    except KeyboardInterrupt:
        say.print("make bench: interrupted; what follows is of the rounds until then", highlight=False)
        status = 130
    except (BenchError, OSError, subprocess.SubprocessError) as error:
        print(f"make bench: cannot measure: {error}", file=sys.stderr)
        return 1
    rows = rows_of(board.series(), PEERS)
    if status and not rows:
        return status
    notes: dict[str, object] = {"missing": missing, "failures": failures}
    _write(rows, machine, notes, output)
    print_results(rows, _titles(), console)
    for line in (*machine.lines(), STARTS):
        console.print(line, highlight=False)
    for who, why in missing.items():
        console.print(f"missing: {who}: {why}", highlight=False, markup=False)
    for failure in failures:
        console.print(f"failed: {failure}", highlight=False, markup=False)
    if baseline and not status:  # a part is no baseline
        whole = {"machine": machine.to_json(), "rows": [row.to_json() for row in rows]}
        baseline.write_text(json.dumps(whole, indent=1) + "\n")
    console.print(f"{output} and {output.parent / 'bench'}/ written after {time.monotonic() - began:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
