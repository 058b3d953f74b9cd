"""--filter K=V of the verbs that list what has few properties: networks and volumes."""

from collections.abc import Callable, Iterable
from typing import TypeVar

from katapod.model.flags import refuse

__all__ = ["chosen"]

Row = TypeVar("Row")


def chosen(rows: Iterable[Row], wanted: Iterable[str], tests: dict[str, Callable[[Row, str], bool]]) -> list[Row]:
    """The rows for which all of `wanted` hold, each KEY=VALUE, by the tests of their keys. Raises UsageError."""
    found = list(rows)
    for text in wanted:
        key, equals, value = text.partition("=")
        if not equals or key not in tests:
            refuse("--filter", text, f"it is not KEY=VALUE with a key of {', '.join(tests)}", "name=app")
        found = [row for row in found if tests[key](row, value)]
    return found
