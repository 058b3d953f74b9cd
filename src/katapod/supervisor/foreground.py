"""This process in the foreground for one in a guest, while that runs: its streams, signals and terminal."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence

from katapod.rpc.status import RpcError
from katapod.sandbox.stdio import GuestProcess, InputFd, OutputFd, carry
from katapod.supervisor.terminal import follow_size, raw_terminal
from katapod.tasks import Background

__all__ = ["carry_streams", "carry_to", "passing_signals"]

UNREAD = 128 + signal.SIGPIPE


def passing_signals(process: GuestProcess, background: Background, *, hang_up: bool = False) -> Callable[[int], None]:
    """What passes a signal on to the process, by a task of `background`; from the third on, SIGKILL.

    With `hang_up` whatever tells us to end is the end of a connection to the process: a shell ignores SIGTERM.
    """
    seen = 0

    def pass_on(number: int) -> None:
        nonlocal seen
        seen += 1
        if hang_up and number != signal.SIGINT:
            number = signal.SIGHUP
        background.start(_forward(process, signal.SIGKILL if seen > 2 else number), name="forward")

    return pass_on


async def _forward(process: GuestProcess, number: int) -> None:
    with contextlib.suppress(RpcError):
        await process.signal(number)


async def carry_streams(process: GuestProcess, *, interactive: bool, hang_up: bool = False) -> int:
    """Carry the streams, pass signals on, and lend the terminal for the time. `hang_up`: as for passing_signals."""
    loop = asyncio.get_running_loop()
    async with Background() as background:
        pass_on = passing_signals(process, background, hang_up=hang_up)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            loop.add_signal_handler(number, pass_on, number)
        with contextlib.ExitStack() as stack:
            if process.terminal and os.isatty(0):
                if interactive:
                    stack.enter_context(raw_terminal(0))
                stack.enter_context(follow_size(process, 0, background))
            status = await carry_to(process, (0, 1, 2), interactive=interactive)
            if status == UNREAD:
                sys.stderr.close()
            return status


async def carry_to(process: GuestProcess, fds: Sequence[int], *, interactive: bool) -> int:
    """Carry the streams of a process to its end, by three descriptors that stay the caller's; returns its exit status,
    or UNREAD if nobody reads what it writes: it is killed then."""
    stdin = InputFd(fds[0]) if interactive else None
    stdout, stderr = OutputFd(fds[1]), OutputFd(fds[2])
    try:
        return await carry(process, stdin, stdout, stderr)
    except BrokenPipeError:
        await _forward(process, signal.SIGKILL)
        return UNREAD
    finally:
        for each in (stdin, stdout, stderr):
            if each is not None:
                each.close()
