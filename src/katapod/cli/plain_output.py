"""Our standard output and error as text: nothing that a guest, an image or an engine wrote steers the terminal.

What is meant to steer it takes the stream below: `raw`. Bytes of containers do not come by here.
"""

import io
import sys
from typing import Any, TextIO

from katapod.model.plain import LINES, plain

__all__ = ["guard_output", "raw"]


class _PlainStream:
    """All of a text stream; what is written is made plain."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(plain(text, keep=LINES))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def guard_output() -> None:
    """Do it for this process. Idempotent."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or isinstance(stream, _PlainStream):
            continue
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may have fewer characters than Unicode
        setattr(sys, name, _PlainStream(stream))


def raw(stream: TextIO) -> TextIO:
    """The stream for what is ours to say to a terminal: colours, a cleared screen."""
    return stream.stream if isinstance(stream, _PlainStream) else stream
