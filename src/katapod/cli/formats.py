"""--format of the verbs that list: a template for each row, "table", or "json" for a line of JSON each."""

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from katapod.cli.command import F, option
from katapod.cli.tables import Column, print_table

__all__ = ["print_each", "print_rows", "the_format"]

the_format: Callable[[F], F] = option(
    "--format", "form", metavar="TEMPLATE", help="Go template for each row, such as '{{.Name}}'; table or json."
)


def print_rows(rows: Iterable[Mapping[str, Any]], form: str, columns: Mapping[str, str]) -> None:
    """`columns`: title to key, of the table that is printed without a template. Raises UsageError."""
    if not form or form == "table":
        print_table([Column(title, _text_of(key)) for title, key in columns.items()], rows)
    else:
        print_each(rows, form)


def print_each(values: Iterable[Any], form: str) -> None:
    """A line for each: of JSON, or by the template. Raises UsageError."""
    if form == "json":
        import json

        for value in values:
            sys.stdout.write(json.dumps(value) + "\n")
        return
    from katapod.model.go_template import parse_template

    template = parse_template(form)
    lines = [template.render(value) for value in values]
    if not template.table:
        for line in lines:
            sys.stdout.write(line + "\n")
        return
    rows = [[_title(name) for name in template.fields], *(line.split("\t") for line in lines)]
    width = max(map(len, rows))
    rows = [row + [""] * (width - len(row)) for row in rows]
    widths = [max(len(row[place]) for row in rows) for place in range(width)]
    for row in rows:
        sys.stdout.write("   ".join(text.ljust(size) for text, size in zip(row, widths, strict=True)).rstrip() + "\n")


def _text_of(key: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: str(row[key])


def _title(name: str) -> str:
    """CONTAINER ID of ContainerId, NAMES of Names."""
    words = "".join(f" {letter}" if letter.isupper() else letter for letter in name).strip()
    return words.upper() if not name.isupper() else name
