"""Starts of sandboxes take turns, so that a host which is asked for many at once does not start all of them at once.

A start is bound by the CPU. Those that run side by side are each as slow as all of them together, share the caches and
come near their time limits; in turns the first is as quick as it would be alone, and the last no later.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

from katapod.host.locks import POLL_S, try_byte

__all__ = ["STARTS_A_CPU", "WAIT_LIMIT_S", "turn"]

STARTS_A_CPU = 2
WAIT_LIMIT_S = 120.0


@contextlib.asynccontextmanager
async def turn(lock_file: Path, places: int, limit_s: float = WAIT_LIMIT_S) -> AsyncIterator[None]:
    """Hold one of so many places on this host while the block runs; it is free again when its holder ends, however that
    ends. After `limit_s` without one the block runs all the same: those who hold them may be guests that hang.

    Raises OSError.
    """
    lock_file.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
    fd = os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        loop = asyncio.get_running_loop()
        end = loop.time() + limit_s
        while not any(try_byte(fd, place) for place in range(places)):
            if loop.time() >= end:
                break
            await asyncio.sleep(POLL_S)
        yield
    finally:
        os.close(fd)
