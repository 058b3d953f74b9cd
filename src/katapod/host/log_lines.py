"""The log of a process: one line each record, whatever stands in it, and no flood of any one of them."""

import logging
from typing import TextIO

from katapod.host.allowance import Allowance
from katapod.model.plain import plain

__all__ = ["log_to"]

BURST, PER_S = 500, 10.0
KINDS_MAX = 1000  # distinct messages remembered at a time
TEXT_MAX = 8192  # characters of a line


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = plain(super().format(record))
        return text if len(text) <= TEXT_MAX else f"{text[:TEXT_MAX]} ..."


class _NoFlood(logging.Filter):
    """Each message, whatever its values, has its own allowance: guests can cause some as often as they like."""

    def __init__(self) -> None:
        super().__init__()
        self._allowances: dict[tuple[str, str], Allowance] = {}
        self._left_out: dict[tuple[str, str], int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        kind = (record.name, str(record.msg))
        if len(self._allowances) >= KINDS_MAX:
            self._allowances.clear()
        if not self._allowances.setdefault(kind, Allowance(BURST, PER_S)).has_one():
            self._left_out[kind] = self._left_out.get(kind, 0) + 1
            return False
        if count := self._left_out.pop(kind, 0):
            record.msg = f"{record.msg} (and {count} like it were left out)"
        return True


def log_to(stream: TextIO | None, level: int, form: str) -> None:
    """Log to `stream`, or standard error, unless a log was set up before. All that is there, with DEBUG."""
    root = logging.getLogger()
    if not root.handlers:
        handler = logging.StreamHandler(stream)
        handler.setFormatter(_OneLine(form))
        if level > logging.DEBUG:
            handler.addFilter(_NoFlood())
        root.addHandler(handler)
        root.setLevel(level)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
