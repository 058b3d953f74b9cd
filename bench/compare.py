"""`make bench-compare`: a run beside the baseline.

Rows are compared by ratio, so that a faster machine is no improvement; rows without one by value. What the spreads
of both explain is noise. The exit status tells of unreadable input only, never of timings.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench.rows import Row, parse_rows
from bench.table import shown_number

__all__ = ["Change", "compare_rows", "main"]

Verdict = Literal["better", "worse", "noise", "spread unknown", "new", "gone"]
BASELINE = Path(__file__).with_name("baseline.json")
MAD_TO_SIGMA = 1.4826  # for normal errors
SIGMAS = 3.0
STYLES = {"better": "green", "worse": "bold red"}


@dataclass(frozen=True, slots=True)
class Change:
    """`before` and `now` are ratios, or values where `by` says so; `noise` is how far apart the spreads let them be."""

    name: str
    by: Literal["ratio", "value"]
    before: float | None
    now: float | None
    noise: float | None
    verdict: Verdict
    before_spread: float | None = None
    now_spread: float | None = None

    @property
    def percent(self) -> float | None:
        return 100 * (self.now / self.before - 1) if self.before and self.now is not None else None


def _compare(old: Row, new: Row) -> Change:
    if old.ratio is not None and new.ratio is not None and old.base == new.base and old.base != old.name:
        by: Literal["ratio", "value"] = "ratio"
        before, now, spreads = old.ratio, new.ratio, (old.ratio_spread, new.ratio_spread)
    else:
        by, before, now, spreads = "value", old.value, new.value, (old.spread, new.spread)
    noise = None
    if before == now:
        verdict: Verdict = "noise"
    elif spreads[0] is None or spreads[1] is None:
        verdict = "spread unknown"
    else:
        noise = SIGMAS * MAD_TO_SIGMA * math.hypot(spreads[0], spreads[1])
        rose = now > before
        verdict = "noise" if abs(now - before) <= noise else "worse" if rose == (new.better == "less") else "better"
    return Change(new.name, by, before, now, noise, verdict, *spreads)


def compare_rows(baseline: Iterable[Row], rows: Iterable[Row]) -> list[Change]:
    """In the order of `rows`; what only the baseline has comes last."""
    old = {row.name: row for row in baseline}
    changes = []
    for row in rows:
        before = old.pop(row.name, None)
        changes.append(
            Change(row.name, "value", None, row.value, None, "new", None, row.spread)
            if before is None
            else _compare(before, row)
        )
    return changes + [Change(row.name, "value", row.value, None, None, "gone", row.spread) for row in old.values()]


def _machine_lines(path: Path) -> list[str]:
    """What a file says of its machine; a list of rows has it in a file beside."""
    beside = path.parent / "bench" / "machine.json"
    for source in (path, beside):
        if source.exists() and isinstance(found := json.loads(source.read_text()), dict) and "machine" in found:
            return [f"{key}: {value}" for key, value in found["machine"].items()]
    return ["not stated"]


def _print(changes: Sequence[Change], console: Console) -> None:
    table = Table(pad_edge=False, box=SIMPLE_HEAD)
    for header in ("what", "by", "baseline", "now", "change", "noise", ""):
        table.add_column(header, justify="left" if header in ("what", "by", "") else "right", overflow="fold")
    for change in changes:
        percent = "" if change.percent is None else f"{change.percent:+.0f} %"
        verdict = "within noise" if change.verdict == "noise" else change.verdict
        table.add_row(
            change.name,
            change.by,
            shown_number(change.before, change.before_spread),
            shown_number(change.now, change.now_spread),
            percent,
            "" if change.noise is None else f"±{shown_number(change.noise)}",
            verdict,
            style=STYLES.get(change.verdict),
        )
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench-compare", description=__doc__)
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    parser.add_argument("--run", type=Path, default=Path("build/bench.json"))
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        changes = compare_rows(*(parse_rows(path.read_text()) for path in (options.baseline, options.run)))
        machines = [_machine_lines(path) for path in (options.baseline, options.run)]
    except (OSError, ValueError) as error:
        print(f"bench-compare: cannot read the results: {error}", file=sys.stderr)
        return 1
    for title, lines in zip(("baseline", "this run"), machines, strict=True):
        console.print(f"[bold]{title}[/bold]: " + "; ".join(lines), highlight=False)
    _print(changes, console)
    counts = {verdict: sum(change.verdict == verdict for change in changes) for verdict in ("better", "worse", "noise")}
    print(f"{counts['better']} better, {counts['worse']} worse, {counts['noise']} within noise, of {len(changes)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
