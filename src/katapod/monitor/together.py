"""Concurrent requests, of which the slowest must not delay all."""

import asyncio
import time
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from katapod.tasks import Background

__all__ = ["GRACE_S", "ask_together"]

GRACE_S = 1.5  # more than a supervisor waits for its guest

_Answer = TypeVar("_Answer")


async def ask_together(
    questions: Sequence[Coroutine[Any, Any, _Answer]], *, grace_s: float = GRACE_S
) -> list[_Answer | None]:
    """The results in the order of `questions`; None for those that came too late.

    When half have finished, the others may take as long again, or `grace_s` if that is more: a loaded host gets the
    time it needs, while a few that hang or are slow on purpose get no more than that. The limits of the questions
    themselves apply too.
    """
    began = time.monotonic()
    async with Background() as background:
        tasks = [background.start(question, name="question") for question in questions]
        pending = set(tasks)
        while len(pending) > len(tasks) // 2:
            _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        if pending:
            await asyncio.wait(pending, timeout=max(grace_s, time.monotonic() - began))
        return [task.result() if task.done() else None for task in tasks]
