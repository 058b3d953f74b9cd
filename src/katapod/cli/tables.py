"""Plain tables and sizes for people."""

from collections.abc import Callable, Iterable
from typing import Any

from msgspec import Struct

from katapod.model.plain import plain

__all__ = ["Column", "print_table", "shown_age", "shown_size", "table_width"]


class Column(Struct, frozen=True):
    """`least`: how far it may be cut so that a table has the width of a terminal; 0: it is never cut."""

    title: str
    text: Callable[[Any], str]
    least: int = 0


def table_width() -> int:
    """Characters of the terminal, or COLUMNS if that is set; 0, which is no limit, where there is no terminal: COLUMNS
    says nothing there, since readline sets it in every process that loads it, and so for all that are started there."""
    import os

    if not os.isatty(1):
        return 0
    text = os.environ.get("COLUMNS", "")
    if text.isdecimal() and int(text):
        return int(text)
    try:
        return os.get_terminal_size(1).columns
    except OSError:
        return 0


def print_table(columns: list[Column], rows: Iterable[Any], width: int = 0) -> None:
    """Print left-aligned columns, as wide as their longest entry; those that may be cut are, until all fit `width`."""
    lines = [[column.title for column in columns]]
    for row in rows:
        lines.append([plain(column.text(row)) for column in columns])
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    _fit(widths, columns, width)
    for line in lines:
        line = [_cut(text, width) for text, width in zip(line, widths, strict=True)]
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def _fit(widths: list[int], columns: list[Column], width: int) -> None:
    """Take from the widest of those that may be cut, a character at a time."""
    while width and sum(widths) + 2 * (len(widths) - 1) > width:
        widest = max(
            (place for place, column in enumerate(columns) if column.least and widths[place] > column.least),
            key=widths.__getitem__,
            default=None,
        )
        if widest is None:
            return
        widths[widest] -= 1


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def shown_age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{int(seconds // size)}{unit}"
    return f"{max(0, int(seconds))}s"


def shown_size(size_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024 or unit == "GiB":
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    raise AssertionError("unreachable")
