"""A command that waits for the end of a process: signals go to its proxy, the status comes from there."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
else:  # what `signal` wraps in enumerations, 5 ms of imports
    import _signal as signal

__all__ = ["wait_for_end"]

PASSED = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGWINCH,
)


def wait_for_end(pid: int, *, terminal: bool) -> int:
    """The exit status, or 128 and the signal that ended it. With `terminal` the process has ours, which is raw
    meanwhile."""

    def pass_on(number: int, _: object) -> None:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return

    for number in PASSED:
        signal.signal(number, pass_on)
    if not terminal:
        return _status(os.waitpid(pid, 0)[1])
    import termios
    import tty

    before = termios.tcgetattr(0)
    try:
        tty.setraw(0, termios.TCSANOW)
        return _status(os.waitpid(pid, 0)[1])
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def _status(wait_status: int) -> int:
    code = os.waitstatus_to_exitcode(wait_status)
    return code if code >= 0 else 128 - code
