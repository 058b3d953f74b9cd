"""Waiting in tests on an event loop: for what is to be seen, and for time limits that are over when a test says so."""

import asyncio
from collections.abc import Callable

__all__ = ["LIMIT_S", "LoopClock", "until"]

LIMIT_S = 60.0
"""For what cannot fail to come, on a machine however busy: it only keeps a test from hanging."""


async def until(condition: Callable[[], object]) -> None:
    """Poll a condition that nobody tells of."""
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110 - it is not made to be waited for
            await asyncio.sleep(0.005)


class LoopClock:
    """The clock of the running loop, which goes on as it did and can be put forward: by more than a time limit, which
    is over then and not before, however long the machine takes for what comes before."""

    def __init__(self) -> None:
        self._ahead_s = 0.0
        loop = asyncio.get_running_loop()
        time = loop.time
        loop.time = lambda: time() + self._ahead_s  # type: ignore[method-assign]

    def pass_time(self, seconds: float) -> None:
        self._ahead_s += seconds
