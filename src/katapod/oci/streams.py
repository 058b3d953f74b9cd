"""The streams of a process as its supervisor gets them: descriptors of ours, or a new terminal."""

from __future__ import annotations

import os

from katapod.oci.errors import OciError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from katapod.oci.arguments import Call

__all__ = ["process_streams"]


def process_streams(call: Call, process: dict[str, Any], *, foreground: bool) -> tuple[list[int], int | None]:
    """Copies of standard input, output and error, the caller's to close; and the terminal that the proxy is to have. In
    the foreground a process that wants a terminal has ours.

    Raises OciError.
    """
    console = call.values.get("console-socket", "")
    if not process.get("terminal"):
        if console:
            raise OciError("cannot use console socket if runc will not detach or allocate tty")
        return [_copy(number) for number in (0, 1, 2)], None
    if console:
        from katapod.oci.console import make_terminal

        slave = make_terminal(console, process.get("consoleSize"))
        return [slave], slave
    if not foreground:
        raise OciError("cannot allocate tty if runc will detach without setting console socket")
    if not os.isatty(0):
        raise OciError("cannot use a terminal: standard input is none, and there is no --console-socket")
    return [os.dup(0)], None


def _copy(number: int) -> int:
    """Of a stream that is closed: the null device."""
    try:
        return os.dup(number)
    except OSError:
        return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
