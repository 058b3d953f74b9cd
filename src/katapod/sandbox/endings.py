"""The end of the process that owns a sandbox, waited for by another one."""

import asyncio

from katapod.host.state import supervisor_alive
from katapod.model.layout import SandboxPaths

__all__ = ["until_supervisor_ended"]

ASK_EVERY_S = 0.02


async def until_supervisor_ended(paths: SandboxPaths) -> None:
    """Nobody tells of the end of a process that is not ours: its lock is looked at."""
    while supervisor_alive(paths):  # noqa: ASYNC110 - it is another process
        await asyncio.sleep(ASK_EVERY_S)
