"""kata-agent: the program's entry."""

from __future__ import annotations

import sys

__all__ = ["main"]

WELL_KNOWN_TYPES = "google.protobuf.internal.well_known_types"


def _spare_well_known_types() -> None:
    """Keep protobuf's C core from importing the helpers for Timestamp, Struct and so on: that takes 0.13 s under
    emulation (calendar, locale, threading), and our messages have no such types. The core reads one name of that
    module, a table of base classes by message."""
    if WELL_KNOWN_TYPES not in sys.modules:
        stand_in = type(sys)(WELL_KNOWN_TYPES)
        stand_in.WKTBASES = {}  # type: ignore[attr-defined]
        sys.modules[WELL_KNOWN_TYPES] = stand_in


def main() -> None:
    """Run the agent; as PID 1, power off at its end."""
    _spare_well_known_types()
    from katapod.agent.start import run

    run()
