"""A pseudo terminal whose user-side settings outlive the program that runs in it."""

import contextlib
import fcntl
import os
import struct
import subprocess
import termios
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pexpect.fdpexpect

__all__ = ["Terminal", "open_terminal"]


@dataclass(frozen=True, slots=True)
class Terminal:
    """A program in a terminal of its own. `screen` reads and types what its user would."""

    process: subprocess.Popen[bytes]
    screen: Any  # pexpect has no types
    user_side: int
    settings_before: list[Any]

    @property
    def settings(self) -> list[Any]:
        return termios.tcgetattr(self.user_side)

    def resize(self, rows: int, columns: int) -> None:
        """The kernel tells the terminal's foreground group by SIGWINCH, as a terminal emulator would."""
        fcntl.ioctl(self.user_side, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def wait(self, limit_s: float = 180) -> int:
        """The exit status. The screen is read meanwhile: a full terminal stops who writes to it."""
        with contextlib.suppress(pexpect.TIMEOUT):
            while self.process.poll() is None:
                self.screen.expect(pexpect.TIMEOUT, timeout=0.1)
                limit_s -= 0.1
                if limit_s < 0:
                    raise AssertionError(f"{self.process.args!r} does not end; its screen: {self.screen.before!r}")
        return self.process.wait()


@contextlib.contextmanager
def open_terminal(command: list[str], rows: int = 24, columns: int = 80) -> Iterator[Terminal]:
    """Run `command` in a new terminal as leader of its session; it is ended with the block."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    before = termios.tcgetattr(theirs)
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    screen = pexpect.fdpexpect.fdspawn(ours, timeout=180, encoding="utf-8", codec_errors="replace")
    try:
        yield Terminal(process, screen, theirs, before)
    finally:
        for end in (process.terminate, process.kill):  # softly first: a test that fails here should leave nothing
            with contextlib.suppress(subprocess.TimeoutExpired):
                end()
                process.wait(180)
        os.close(theirs)
        screen.close()
