"""The agent's log: short lines on standard error, which is the guest console when it is PID 1.

The console is slow, so the default level only reports the life cycle.
"""

from __future__ import annotations

import os

__all__ = ["debug", "error", "info", "set_level", "warning"]

LEVELS = {"trace": 0, "debug": 0, "info": 1, "warn": 2, "warning": 2, "error": 3, "critical": 3, "fatal": 3}
LINE_MAX = 1024
_level = 1


def set_level(name: str) -> None:
    """Unknown names do not change the level, as with unknown agent.* parameters."""
    global _level
    _level = LEVELS.get(name, _level)


def _write(text: str) -> None:
    text = text[:LINE_MAX].replace("\n", "\\n")  # one line each, whatever a program or a peer has written
    line = f"kata-agent: {text}\n".encode(errors="replace")
    try:
        os.write(2, line)
    except OSError:
        return  # a failure to log must not stop the agent


def debug(text: str) -> None:
    if _level <= 0:
        _write(text)


def info(text: str) -> None:
    if _level <= 1:
        _write(text)


def warning(text: str) -> None:
    if _level <= 2:
        _write(f"warning: {text}")


def error(text: str) -> None:
    _write(f"error: {text}")
