"""How long the calls of a client or a server took, as a histogram that metrics show (observe/process_metrics.py)."""

from bisect import bisect_left

__all__ = ["BUCKETS_MS", "CallTimes"]

BUCKETS_MS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class CallTimes:
    """Counts of calls by action and time, milliseconds; an action of "" has no label in the metrics.

    `counts`: of each action, how many calls took at most as long as each bucket and longer than the one before it; the
    last are those that took longer than all. `sums_ms`: of each action.
    """

    def __init__(self, name: str, what: str) -> None:
        """`name` and `what` are those of the metric."""
        self.name = name
        self.what = what
        self.counts: dict[str, list[int]] = {}
        self.sums_ms: dict[str, float] = {}

    def observe(self, action: str, seconds: float) -> None:
        milliseconds = seconds * 1000
        counts = self.counts.setdefault(action, [0] * (len(BUCKETS_MS) + 1))
        counts[bisect_left(BUCKETS_MS, milliseconds)] += 1
        self.sums_ms[action] = self.sums_ms.get(action, 0.0) + milliseconds
