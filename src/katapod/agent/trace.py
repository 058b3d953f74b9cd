"""A bounded list of timed spans, which the host can read (katapod.Guest/Trace)."""

from __future__ import annotations

import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["SPANS_MAX", "Span", "clear", "spans"]

SPANS_MAX = 512
_spans: list[tuple[str, int, int]] = []


class Span:
    """Measures a `with` block by the monotonic clock, in nanoseconds; the newest SPANS_MAX are kept."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._start = 0

    def __enter__(self) -> None:
        self._start = time.monotonic_ns()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if len(_spans) >= SPANS_MAX:
            del _spans[: SPANS_MAX // 2]
        _spans.append((self._name, self._start, time.monotonic_ns()))


def clear() -> None:
    """Clear the list: a clone's trace begins when it resumes, not when its template was built."""
    _spans.clear()


def spans() -> list[tuple[str, int, int]]:
    """(name, start, duration) in nanoseconds, the start since the epoch, by the current clock: a clock that was set
    meanwhile does not disrupt the time line."""
    offset = time.time_ns() - time.monotonic_ns()
    return [(name, start + offset, end - start) for name, start, end in _spans]
