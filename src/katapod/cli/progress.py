"""Progress bars on standard error, drawn only for a terminal and only when something takes a while."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from katapod.cli.plain_output import raw
from katapod.model.plain import plain

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["image_progress", "step_progress", "waiting"]

QUIET_S = 0.3  # what is done sooner needs no bar

Report = Callable[[str, int, int | None], None]


class _Bars:
    """Bars by phase; rich is loaded when the first is drawn."""

    def __init__(self, *, sizes: bool) -> None:
        self._sizes = sizes
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._since = time.monotonic()

    def report(self, phase: str, done: int, total: int | None) -> None:
        if time.monotonic() - self._since < QUIET_S:
            return
        if self._progress is None:
            self._progress = self._open()
        if phase not in self._tasks:
            for task in self._tasks.values():
                known = self._progress.tasks[task].total
                self._progress.update(task, completed=known)
            self._tasks[phase] = self._progress.add_task(plain(phase), total=total)
        self._progress.update(self._tasks[phase], completed=done, total=total)

    def _open(self) -> "Progress":
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        measure = DownloadColumn(binary_units=True) if self._sizes else TaskProgressColumn()
        progress = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(),
            measure,
            TimeElapsedColumn(),
            console=Console(file=raw(sys.stderr)),
        )
        progress.start()
        return progress

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


@contextlib.contextmanager
def image_progress() -> Iterator[Report | None]:
    """Yield a report function (phase, bytes done, bytes in all), or None where nobody would see a bar."""
    if not sys.stderr.isatty():
        yield None
        return
    bars = _Bars(sizes=True)
    try:
        yield bars.report
    finally:
        bars.close()


@contextlib.contextmanager
def step_progress() -> Iterator[Callable[[str, float], None]]:
    """Yield a report function (step, fraction 0..1). Without a terminal each step is a line once."""
    if sys.stderr.isatty():
        bars = _Bars(sizes=False)
        try:
            yield lambda step, fraction: bars.report(step, int(fraction * 1000), 1000)
        finally:
            bars.close()
        return
    seen: set[str] = set()

    def line(step: str, fraction: float) -> None:
        if 0.0 < fraction < 1.0 and step not in seen:  # what only looks, or is done, is no news
            seen.add(step)
            print(f"  {step}", file=sys.stderr, flush=True)

    yield line


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show that something of unknown length goes on; without a terminal nothing."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(file=raw(sys.stderr)).status(plain(what)):
        yield
