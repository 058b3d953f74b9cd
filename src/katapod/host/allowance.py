"""How often something may happen that a guest can cause: at once for a while, then at a steady rate."""

import time
from collections.abc import Callable

__all__ = ["Allowance"]


class Allowance:
    """`burst` at once; refilled at `per_s`."""

    def __init__(self, burst: int, per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._burst = burst
        self._per_s = per_s
        self._clock = clock
        self._left = float(burst)
        self._at = clock()

    def _fill(self) -> None:
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._at) * self._per_s)
        self._at = now

    def take(self) -> float:
        """Take one in any case; returns how long the caller has to wait, in seconds."""
        self._fill()
        self._left -= 1
        return max(0.0, -self._left / self._per_s)

    def has_one(self) -> bool:
        """Take one if there is one."""
        self._fill()
        if self._left < 1:
            return False
        self._left -= 1
        return True
