"""Work that has to reach its end although who waits for it is told to stop: releases, mostly."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["finish"]

_Result = TypeVar("_Result")


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
