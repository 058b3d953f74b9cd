"""Time limits for a guest: how long the host has kept it waiting for a CPU does not count."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from katapod.host.thread_times import thread_times

__all__ = ["patient_timeout", "waited_s"]

PATIENCE = 10  # times a limit, at most, on a host that has no CPU to give


@contextlib.asynccontextmanager
async def patient_timeout(limit_s: float, pid: int) -> AsyncIterator[None]:
    """As asyncio.timeout, for work that the process `pid` has to do: the limit grows by the time that it has waited for
    a CPU, and ends at PATIENCE times what was given. Raises TimeoutError."""
    loop = asyncio.get_running_loop()
    began, before = loop.time(), waited_s(pid)
    async with asyncio.timeout(None) as timeout:

        def look() -> None:
            waited = max(0.0, waited_s(pid) - before)
            deadline = began + min(limit_s + waited, PATIENCE * limit_s)
            if deadline <= loop.time():
                timeout.reschedule(deadline)
            else:
                looks.append(loop.call_at(deadline, look))

        looks = [loop.call_later(limit_s, look)]
        try:
            yield
        finally:
            looks[-1].cancel()


def waited_s(pid: int) -> float:
    """Seconds that the thread of `pid` with the longest wait has stood in line for a CPU; 0 if that has ended."""
    return max((each.waited_ns for each in thread_times(pid)), default=0) / 1e9
