"""Transcripts of docker: lines, the shape of what each prints, and its exit status. See tests/e2e/docker-lines.txt."""

import re
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

__all__ = ["LINES", "Line", "read_lines"]

LINES = Path(__file__).parents[1] / "e2e" / "docker-lines.txt"
HOLES = {"word": r"\S+", "n": r"\d+", "any": r".*"}
STATUS = re.compile(r"\[(\d+)\]")


class Line(Struct, frozen=True):
    """`shape`: of standard output, line by line; `reason`: why kata-runtime differs, if it does."""

    section: str
    words: str
    shape: tuple[str, ...]
    status: int
    reason: str

    def fits(self, out: str) -> bool:
        return re.fullmatch("".join(_pattern(each) for each in self.shape), out) is not None


def _pattern(shape: str) -> str:
    if shape == "{...}":
        return r"(?:.*\n)*"
    parts = re.split(r"\{(word|n|any)\}", shape)
    return "".join(HOLES[part] if place % 2 else re.escape(part) for place, part in enumerate(parts)) + r"\n"


def read_lines(text: str) -> Iterator[Line]:
    """Raises ValueError for a block that does not begin with its line."""
    section = ""
    for block in re.split(r"\n{2,}(?=\$ |#)", text.strip()):
        first, *rest = block.split("\n")
        if first.startswith("## "):
            section = first.removeprefix("## ")
        if first.startswith("#"):
            continue
        if not first.startswith("$ "):
            raise ValueError(f"{first!r} is no line")
        reason = " ".join(each.removeprefix("! ") for each in rest if each.startswith("! "))
        rest = [each for each in rest if not each.startswith("! ")]
        status = STATUS.fullmatch(rest[-1]) if rest else None
        shape = tuple(rest[:-1] if status else rest)
        yield Line(section, first.removeprefix("$ "), shape, int(status[1]) if status else 0, reason)
