"""Time limits for a guest: how long the host has kept it waiting for a CPU does not count."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Protocol

from katapod.host.descendants import descendants
from katapod.host.thread_times import thread_times

__all__ = ["Patience", "patient_timeout"]

PATIENCE = 10  # times a limit, at most, on a host that has no CPU to give
LOOK_S = 1.0
LATE_S = 2.0  # between two looks that are a second apart: what is more, this process has not had a CPU itself


class Guest(Protocol):
    """Part of VirtualMachine."""

    @property
    def pid(self) -> int:
        """0 as long as there is none."""


class Patience:
    """How long a VM had to get something done. User-mode Linux runs its guest's processes as processes of the host, one
    at a time, so what they wait counts together; of threads that may run side by side the one that waits longest."""

    def __init__(self, guest: Guest) -> None:
        self.waited_s = 0.0
        self.had_s = 0.0
        self._guest = guest
        self._waits = self._look()

    def _look(self) -> dict[int, dict[int, int]]:
        """Nanoseconds by process and thread."""
        pids = descendants(self._guest.pid)
        return {pid: {each.thread_id: each.waited_ns for each in thread_times(pid)} for pid in pids}

    def count(self, window_s: float) -> None:
        """The time since the last look."""
        before, self._waits = self._waits, self._look()
        waited_ns = 0
        for pid, threads in self._waits.items():
            known = before.get(pid, {})
            waited_ns += max((waits - known.get(thread, 0) for thread, waits in threads.items()), default=0)
        waited_s = min(waited_ns / 1e9, window_s)
        self.waited_s += waited_s
        self.had_s += min(window_s - waited_s, LATE_S)

    def left_out(self) -> str:
        """For the message of a limit that was reached; empty where it makes no difference."""
        return f", beside {self.waited_s:.0f} s for which this host gave it no CPU" if self.waited_s >= LOOK_S else ""


@contextlib.asynccontextmanager
async def patient_timeout(limit_s: float, guest: Guest) -> AsyncIterator[Patience]:
    """As asyncio.timeout, for work that the VM `guest` has to do: time for which it waited for a CPU does not count,
    up to PATIENCE times the limit in all. Raises TimeoutError."""
    loop = asyncio.get_running_loop()
    patience = Patience(guest)
    began = looked = loop.time()
    next_look: asyncio.TimerHandle
    async with asyncio.timeout(None) as timeout:

        def look() -> None:
            nonlocal looked, next_look
            now = loop.time()
            patience.count(now - looked)
            looked = now
            if patience.had_s >= limit_s or now - began >= PATIENCE * limit_s:
                timeout.reschedule(now)
            else:
                next_look = loop.call_later(min(LOOK_S, limit_s - patience.had_s), look)

        next_look = loop.call_later(min(LOOK_S, limit_s), look)
        try:
            yield patience
        finally:
            next_look.cancel()
