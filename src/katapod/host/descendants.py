"""The processes below one, from /proc. Looks only."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

__all__ = ["descendants"]


def descendants(pid: int) -> Iterator[int]:
    """`pid` and all that it, or they, have started. Source: proc_pid_task(5)."""
    ahead = [pid]
    while ahead:  # and no recursion: they may be a chain of any length
        yield (each := ahead.pop())
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for task in Path(f"/proc/{each}/task").iterdir():
                ahead += map(int, (task / "children").read_text().split())
