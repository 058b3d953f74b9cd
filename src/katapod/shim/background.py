"""Tasks of the shim that run beside calls: one owner starts them, ends them, and reports what went wrong in them."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from katapod.host.tasks import end_tasks

__all__ = ["Background"]

log = logging.getLogger(__name__)


class Background:
    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        """Run `work`, which handles the errors that it expects."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    async def close(self) -> None:
        """Cancel what still runs, and wait for its end."""
        await end_tasks(self._tasks)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("unexpected error in the task %s", task.get_name(), exc_info=error)
