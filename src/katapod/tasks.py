"""Tasks and who owns them: every task is started here, and awaited by whoever has it started.

  beside       work beside a block, which cancels it at its end     together   work side by side, awaited
  Background   what is started meanwhile, until it is closed        finish     work that no cancellation cuts short

An error of a task goes to whoever awaits it. One that nobody awaits is logged: by Background at once, else by asyncio.
Each task has a name, that of its coroutine unless another is given. This module belongs to no room, and imports none.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
from types import TracebackType
from typing import Any, TypeVar, overload

__all__ = ["Background", "beside", "end_tasks", "finish", "together"]

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")
_Other = TypeVar("_Other")
_Third = TypeVar("_Third")


def _begin(work: Coroutine[Any, Any, _Result], name: str | None) -> "asyncio.Task[_Result]":
    return asyncio.create_task(work, name=name or getattr(work, "__qualname__", None))


async def finish(
    work: Coroutine[Any, Any, _Result],
    *,
    name: str | None = None,
    on_cancel: Callable[[], None] = lambda: None,
) -> _Result:
    """Carry `work` to its end even when we are cancelled meanwhile, and more than once; the cancellation
    follows after it. `on_cancel` is called when the first one comes, and may have the work end sooner.

    `work` runs in a task of its own: in one that has been cancelled, asyncio.timeout of Python 3.11.2 ends with
    CancelledError in place of TimeoutError.
    """
    task = _begin(work, name)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as exc:
            if cancelled is None:
                on_cancel()
            cancelled = exc
    if cancelled is not None:
        _heed(task)  # the cancellation is what the caller gets
        raise cancelled
    return task.result()


@overload
async def together(
    first: Coroutine[Any, Any, _Result], second: Coroutine[Any, Any, _Other], /
) -> tuple[_Result, _Other]: ...
@overload
async def together(
    first: Coroutine[Any, Any, _Result], second: Coroutine[Any, Any, _Other], third: Coroutine[Any, Any, _Third], /
) -> tuple[_Result, _Other, _Third]: ...
@overload
async def together(*works: Coroutine[Any, Any, _Result]) -> tuple[_Result, ...]: ...
async def together(*works: Coroutine[Any, Any, Any]) -> tuple[Any, ...]:
    """Run all side by side; returns their results. When one fails, or we are cancelled, the others are cancelled and
    waited for, also when we are cancelled again meanwhile: they are then, too.

    Raises what the first of them to fail has raised.
    """
    if not works:
        return ()
    tasks = [_begin(work, None) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                raise error
        return tuple(task.result() for task in tasks)
    finally:
        try:
            await end_tasks(tasks)
        finally:
            for task in tasks:  # what the others raise when they are cancelled comes of the first failure
                _heed(task)


@contextlib.asynccontextmanager
async def beside(
    work: Coroutine[Any, Any, _Result], *, name: str | None = None, may_fail: bool = False
) -> AsyncIterator["asyncio.Task[_Result]"]:
    """Run `work` beside the block. When the block ends it is cancelled and waited for.

    With `may_fail` nobody is told of an error of it but a block that awaits it.
    """
    task = _begin(work, name)
    if may_fail:
        task.add_done_callback(_heed)
    try:
        yield task
    finally:
        await end_tasks({task})


class Background:
    """Tasks that run beside whatever starts them, until this is closed: it cancels them and waits for their end."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        """How many have not ended."""
        return len(self._tasks)

    def start(self, work: Coroutine[Any, Any, _Result], *, name: str) -> "asyncio.Task[_Result]":
        """Run `work`, which handles the errors that it expects."""
        task = _begin(work, name)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("unexpected error in the task %s", task.get_name(), exc_info=error)

    async def close(self) -> None:
        """Cancel what still runs, and wait for its end. Idempotent."""
        while running := {task for task in self._tasks if not task.done()}:  # one may have started another
            await end_tasks(running)

    async def __aenter__(self) -> "Background":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


async def end_tasks(tasks: "Collection[asyncio.Task[Any]]") -> None:
    """Cancel tasks, and wait until all of them have ended, also when we are cancelled meanwhile."""
    tasks, cancelled = set(tasks), None
    while tasks:
        for task in tasks:
            task.cancel()
        try:
            await asyncio.wait(tasks)
            break
        except asyncio.CancelledError as exc:
            cancelled = exc
    if cancelled is not None:
        raise cancelled


def _heed(task: "asyncio.Task[Any]") -> None:
    """Else asyncio says that nobody has asked for its error."""
    if task.done() and not task.cancelled():
        task.exception()
