"""Commands that change something and take their time: at a signal all is undone again."""

import asyncio
import signal
import sys
from collections.abc import Coroutine
from typing import Any

from katapod.tasks import beside

__all__ = ["interruptible"]


def interruptible(work: Coroutine[Any, Any, int]) -> int:
    """Run to the end, or, at SIGINT and SIGTERM, to where all is undone again. Returns the exit status."""

    async def go() -> int:
        async with beside(work, name="interruptible") as task:
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, task.cancel)
            try:
                return await task
            except asyncio.CancelledError:
                print("kata-runtime: interrupted; nothing was changed", file=sys.stderr)
                return 130

    return asyncio.run(go())
