"""Plain tables and sizes for people."""

from collections.abc import Callable, Iterable
from typing import Any

from msgspec import Struct

from katapod.model.plain import plain

__all__ = ["Column", "print_table", "shown_age", "shown_size"]


class Column(Struct, frozen=True):
    title: str
    text: Callable[[Any], str]


def print_table(columns: list[Column], rows: Iterable[Any]) -> None:
    """Print left-aligned columns, as wide as their longest entry."""
    lines = [[column.title for column in columns]]
    for row in rows:
        lines.append([plain(column.text(row)) for column in columns])
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


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
