"""What a verb does for a process in the guest while that runs: its streams, signals and terminal."""

import asyncio
import contextlib
import os
import signal
import sys
from typing import TYPE_CHECKING

from katapod.model.errors import NotFound

if TYPE_CHECKING:
    from katapod.rpc.status import RpcError
    from katapod.sandbox.client import ControlClient
    from katapod.sandbox.stdio import GuestProcess

__all__ = ["carry_streams", "why_cut_off"]


async def why_cut_off(client: "ControlClient", error: "RpcError | NotFound", ended: str) -> str:
    """The cause of a broken connection to the owner; `ended` says the usual one."""
    from katapod.host.state import owner_alive
    from katapod.model.record import State

    if not client.connection.closed.done():
        return str(error)
    # The owner ends the connection when its container has ended, and says so in the record, or it was killed.
    for _ in range(50):
        record = client.record_now()
        if record is None or all(item.state is State.STOPPED for item in record.containers):
            break
        if not owner_alive(client.paths):
            return "the kata-runtime that runs the container was killed"
        await asyncio.sleep(0.02)
    return ended


async def carry_streams(process: "GuestProcess", *, interactive: bool, hang_up: bool = False) -> int:
    """Carry the streams, pass signals on, and lend the terminal for the time.

    With `hang_up` whatever tells us to end is the end of a connection to the process: a shell ignores SIGTERM.
    """
    from katapod.rpc.status import RpcError
    from katapod.sandbox.stdio import InputFd, OutputFd, carry
    from katapod.supervisor.terminal import follow_size, raw_terminal

    loop = asyncio.get_running_loop()
    sending: set[asyncio.Task[None]] = set()
    seen = 0

    async def forward(number: int) -> None:
        with contextlib.suppress(RpcError):
            await process.signal(number)

    def on_signal(number: signal.Signals) -> None:
        nonlocal seen
        seen += 1
        if hang_up and number != signal.SIGINT:
            number = signal.SIGHUP
        task = asyncio.create_task(forward(signal.SIGKILL if seen > 2 else number), name="forward")
        sending.add(task)
        task.add_done_callback(sending.discard)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        loop.add_signal_handler(number, on_signal, number)
    with contextlib.ExitStack() as stack:
        if process.terminal and os.isatty(0):
            if interactive:
                stack.enter_context(raw_terminal(0))
            stack.enter_context(follow_size(process, 0))
        try:
            return await carry(process, InputFd(0) if interactive else None, OutputFd(1), OutputFd(2))
        except BrokenPipeError:
            await forward(signal.SIGKILL)
            sys.stderr.close()
            return 141
