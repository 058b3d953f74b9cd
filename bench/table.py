"""Results as tables on the terminal."""

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.rows import Row

__all__ = ["print_results", "shown_number"]


def shown_number(value: float | None, spread: float | None = None) -> str:
    """Three digits that matter; with its spread, if there is one."""
    if value is None:
        return ""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 or value == 0 else 3
    text = f"{value:,.{digits}f}"
    return text if spread is None else f"{text} ±{spread:,.{digits}f}"


def _verdict(row: Row) -> Text:
    if row.budget is None:
        return Text("")
    return {
        True: Text("within", style="green"),
        False: Text("over", style="bold red"),
        None: Text("nothing to compare with", style="yellow"),
    }[row.within]


def _table(title: str, rows: Sequence[Row]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", pad_edge=False, box=SIMPLE_HEAD)
    for header in ("what", "who"):
        table.add_column(header, overflow="fold")
    for header in ("value", "unit", "ratio", "to", "runsc", "budget", ""):
        words = header in ("unit", "to", "")
        table.add_column(header if header != "runsc" else "x runsc", justify="left" if words else "right")
    last = None
    for row in rows:
        if last not in (None, row.metric):
            table.add_section()
        table.add_row(
            row.metric if row.metric != last else "",
            row.contestant,
            shown_number(row.value, row.spread),
            row.unit,
            shown_number(row.ratio, row.ratio_spread),
            row.base_shown,
            shown_number(row.peers.get("runsc")),
            "" if row.budget is None else f"{row.budget:g}",
            _verdict(row),
        )
        last = row.metric
    return table


def print_results(rows: Sequence[Row], titles: Mapping[str, str], console: Console) -> None:
    """One table for each group, in the order of `titles` (group -> title), metric by metric."""
    for group, title in titles.items():
        found = [row for row in rows if row.group == group]
        metrics = list(dict.fromkeys(row.metric for row in found))
        if found:
            console.print(_table(title, sorted(found, key=lambda row: metrics.index(row.metric))))
