"""The log of a process: one line each record, whatever stands in it."""

import logging
from typing import TextIO

from katapod.model.plain import plain

__all__ = ["log_to"]


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))


def log_to(stream: TextIO | None, level: int, form: str) -> None:
    """Log to `stream`, or standard error, unless a log was set up before."""
    root = logging.getLogger()
    if not root.handlers:
        handler = logging.StreamHandler(stream)
        handler.setFormatter(_OneLine(form))
        root.addHandler(handler)
        root.setLevel(level)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
