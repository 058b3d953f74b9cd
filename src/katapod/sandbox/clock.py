"""Keeps a guest's clock that of its host: a guest has no other source of time than what it had at its start.

The clocks are compared from time to time, and at once when the host's is set (which a suspend does too) or when the
guest was paused. docs/adr/0033-the-guests-clock.md.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable
from typing import Protocol

from katapod.kernel.clock import open_clock_bell, ring_again
from katapod.plan.clock import GOOD_ERROR_NS, Reading, has_wrong_rate, plan_correction
from katapod.rpc.status import RpcError, StatusCode

__all__ = ["ClockKeeper", "GuestClock"]

log = logging.getLogger(__name__)

FIRST_S = 2.0
PERIOD_S = 10.0
TRIES = 4  # for a reading with a small error
CALL_LIMIT_S = 30.0
TIME_MAX_NS = 1 << 63


class GuestClock(Protocol):
    """Part of AgentClient."""

    async def clock(
        self, *, step_ns: int = ..., slew_ns: int = ..., other_source: bool = ..., timeout_s: float
    ) -> int: ...


class ClockKeeper:
    """`run` keeps one guest's clock until it is cancelled, or the agent turns out to have no such call."""

    def __init__(
        self,
        agent: GuestClock,
        sandbox_id: str,
        now_ns: Callable[[], int] = time.time_ns,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._agent = agent
        self._sandbox_id = sandbox_id
        self._now_ns = now_ns
        self._monotonic_ns = monotonic_ns
        self._last: tuple[int, int, int] | None = None  # our monotonic clock, the guest's clock, the reading's error
        self._pause_s = PERIOD_S
        self._wanted = asyncio.Event()

    def look_soon(self) -> None:
        """Compare the clocks now: something may have changed one of them."""
        self._wanted.set()

    async def run(self) -> None:
        bell = self._hang_bell()
        try:
            await self._wait(FIRST_S)
            while await self.look():
                await self._wait(self._pause_s)
        finally:
            if bell is not None:
                asyncio.get_running_loop().remove_reader(bell)
                os.close(bell)

    def _hang_bell(self) -> int | None:
        try:
            bell = open_clock_bell()
        except OSError as exc:  # no kernel of ours lacks it, but a seccomp filter around us may
            log.warning("a step of the host's clock is noticed up to %g s later: %s", PERIOD_S, exc)
            return None

        def rung() -> None:
            ring_again(bell)
            self.look_soon()

        asyncio.get_running_loop().add_reader(bell, rung)
        return bell

    async def _wait(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._wanted.wait()
        except TimeoutError:
            pass
        self._wanted.clear()

    async def look(self) -> bool:
        """Compare the clocks once, and correct the guest's; returns whether that can be done again."""
        try:
            reading = await self._read()
            if reading is None:
                return True
            await self._judge_rate(reading)
            found = plan_correction(reading)
            self._pause_s = FIRST_S if found.step_ns else PERIOD_S  # a wrong rate shows soon
            self._last = self._monotonic_ns(), self._guest_now(reading) + found.step_ns, reading.error_ns
            if found.step_ns:
                await self._agent.clock(step_ns=found.step_ns, timeout_s=CALL_LIMIT_S)
                log.info("the clock of %s was set: it was %.3f s ahead", self._sandbox_id, reading.ahead_ns / 1e9)
            elif found.slew_ns:
                await self._agent.clock(slew_ns=found.slew_ns, timeout_s=CALL_LIMIT_S)
        except RpcError as exc:
            if exc.code is StatusCode.UNIMPLEMENTED:
                log.warning("the clock of %s is not kept: its agent has no such call", self._sandbox_id)
                return False
            log.debug("cannot compare the clock of %s: %s", self._sandbox_id, exc)
        return True

    def _guest_now(self, reading: Reading) -> int:
        return self._now_ns() + reading.ahead_ns

    async def _judge_rate(self, reading: Reading) -> None:
        """Have a clock source left that runs too fast or too slow. Raises RpcError."""
        if self._last is None:
            return
        then, guest_then, error_ns = self._last
        elapsed, guest_elapsed = self._monotonic_ns() - then, self._guest_now(reading) - guest_then
        if has_wrong_rate(elapsed, guest_elapsed, error_ns + reading.error_ns):
            log.warning(
                "the clock of %s runs %.3f times as fast as ours: its guest takes another clock source",
                self._sandbox_id,
                guest_elapsed / elapsed,
            )
            await self._agent.clock(other_source=True, timeout_s=CALL_LIMIT_S)

    async def _read(self) -> Reading | None:
        """The best of a few readings: a busy guest answers late. None: the host's clock was set meanwhile, each time.
        Raises RpcError."""
        best = None
        for _ in range(TRIES):
            before = self._now_ns()
            told = await self._agent.clock(timeout_s=CALL_LIMIT_S)
            reading = Reading(before, min(max(0, told), TIME_MAX_NS), self._now_ns())
            if reading.error_ns >= 0 and (best is None or reading.error_ns < best.error_ns):
                best = reading
            if best is not None and best.error_ns <= GOOD_ERROR_NS:
                break
        return best
