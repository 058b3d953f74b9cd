"""`kill`, `pause`, `resume`."""

from __future__ import annotations

from katapod.oci.errors import NOT_RUNNING, OciError
from katapod.oci.link import ask
from katapod.oci.records import Store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from katapod.oci.arguments import Call

__all__ = ["kill", "parse_signal", "pause", "resume"]

TERM = 15
SIGNAL_MAX = 64
_NAMES = (
    "HUP INT QUIT ILL TRAP ABRT BUS FPE KILL USR1 SEGV USR2 PIPE ALRM TERM STKFLT CHLD CONT STOP TSTP TTIN TTOU URG"
    " XCPU XFSZ VTALRM PROF WINCH IO PWR SYS"
)
"""In the order of their numbers on Linux, from 1. Source: signal(7). The module signal takes 5 ms to load."""
OTHER_NAMES = {"IOT": 6, "CLD": 17, "POLL": 29}
RTMIN, RTMAX = 34, 64


def kill(call: Call) -> int:
    number = parse_signal(call.operands[1]) if len(call.operands) > 1 else TERM
    return _ask(call, {"do": "kill", "signal": number, "all": "all" in call.switches})


def pause(call: Call) -> int:
    return _ask(call, {"do": "pause"})


def resume(call: Call) -> int:
    return _ask(call, {"do": "resume"})


def _ask(call: Call, message: dict[str, object]) -> int:
    record = Store(call.root).record(call.id)
    state = record.read()
    if state["status"] == "stopped":
        if message.get("all"):  # as runc: engines clean up so
            return 0
        raise OciError(NOT_RUNNING)
    ask(record, state, message)
    return 0


def parse_signal(text: str) -> int:
    """A number, or a name with or without SIG. Raises OciError."""
    if text.isascii() and text.isdigit() and len(text) < 4:
        number = int(text)
    else:
        name = text.upper().removeprefix("SIG")
        number = _named(name)
    if not 0 <= number <= SIGNAL_MAX:
        raise OciError(f"unknown signal {text!r}")
    return number


def _named(name: str) -> int:
    names = _NAMES.split()
    if name in names:
        return names.index(name) + 1
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    for base, start, sign in (("RTMIN", RTMIN, 1), ("RTMAX", RTMAX, -1)):
        rest = name.removeprefix(base).lstrip("+-")
        if name.startswith(base) and (rest.isdigit() or not rest) and len(rest) < 3:
            return start + sign * int(rest or 0)
    return -1
