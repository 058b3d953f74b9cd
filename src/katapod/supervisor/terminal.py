"""The caller's terminal: raw while a container has it, and restored whatever happens."""

import asyncio
import contextlib
import os
import signal
import termios
import tty
from collections.abc import Iterator

from katapod.model.errors import KatapodError
from katapod.rpc.status import RpcError
from katapod.sandbox.stdio import GuestProcess
from katapod.tasks import Background

__all__ = ["follow_size", "raw_terminal"]


@contextlib.contextmanager
def raw_terminal(fd: int) -> Iterator[None]:
    """Pass every key on as it is: Ctrl-C and Ctrl-D belong to the container."""
    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd, termios.TCSANOW)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


@contextlib.contextmanager
def follow_size(process: GuestProcess, fd: int, background: Background) -> Iterator[None]:
    """Give the guest's terminal the size of ours, now and whenever it changes, by a task of `background`."""
    changed = asyncio.Event()
    changed.set()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGWINCH, changed.set)

    async def follow() -> None:
        while True:
            await changed.wait()
            changed.clear()
            with contextlib.suppress(KatapodError, RpcError, OSError):  # the process or the terminal has gone
                size = os.get_terminal_size(fd)
                await process.resize(size.lines, size.columns)

    task = background.start(follow(), name="terminal-size")
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGWINCH)
        task.cancel()
