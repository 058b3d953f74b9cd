"""Work that must finish although its caller is cancelled, and work side by side."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
from typing import Any, TypeVar

__all__ = ["beside", "end_tasks", "finish", "in_own_thread", "together"]

_Result = TypeVar("_Result")
_Other = TypeVar("_Other")


async def finish(work: Coroutine[Any, Any, _Result], *, name: str | None = None) -> _Result:
    """Carry `work` to its end even when we are cancelled meanwhile, and more than once; the cancellation
    follows after it.

    `work` runs in a task of its own: in one that has been cancelled, asyncio.timeout of Python 3.11.2 ends with
    CancelledError in place of TimeoutError.
    """
    task = asyncio.create_task(work, name=name)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as exc:
            cancelled = exc
    if cancelled is not None:
        task.exception()  # seen: the cancellation is what the caller gets
        raise cancelled
    return task.result()


async def together(first: Coroutine[Any, Any, _Result], second: Coroutine[Any, Any, _Other]) -> tuple[_Result, _Other]:
    """Run both side by side. When one fails, or we are cancelled, the other is cancelled and waited for, also when we
    are cancelled again meanwhile: they are then, too.

    Raises what the first of them to fail has raised.
    """
    tasks = (asyncio.ensure_future(first), asyncio.ensure_future(second))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                raise error
        return tasks[0].result(), tasks[1].result()
    finally:
        await end_tasks(tasks)


@contextlib.asynccontextmanager
async def beside(work: Coroutine[Any, Any, _Result], *, name: str) -> AsyncIterator["asyncio.Task[_Result]"]:
    """Run `work` beside the block. When the block ends it is cancelled and waited for."""
    task = asyncio.create_task(work, name=name)
    try:
        yield task
    finally:
        await end_tasks({task})


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


def in_own_thread(work: Callable[[], _Result], *, name: str) -> _Result:
    """Run `work` in a thread that ends with it: for what changes the thread itself, such as its namespaces or its
    working directory, and must not come back to anybody. Blocks. Raises what `work` raises."""
    outcome: list[_Result] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as exc:
            failure.append(exc)

    thread = threading.Thread(target=run, name=name)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]
