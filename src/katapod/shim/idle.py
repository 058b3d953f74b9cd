"""When a server without a VM exits by itself, because nothing will be asked of it any more.

Engines end their shims by Shutdown, but not if they were killed, or gave up on a container that could not be created.
A server that has a VM or is starting one never exits so.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable

from msgspec import Struct

from katapod.shim.tasks import Tasks

__all__ = ["Connections", "Use", "reason_to_end", "watch_use"]

log = logging.getLogger(__name__)

PERIOD_S = 10.0
IDLE_S = 120.0  # without a task: more than an engine takes to connect and make its first call
ORPHAN_S = 900.0  # exits are kept for this long: an engine's restart or upgrade takes less


class Connections:
    """Connections of engines: how many are open, and for how long nothing has happened on them."""

    def __init__(self) -> None:
        self.open = 0
        self.calls = 0  # being answered
        self._changed = time.monotonic()

    @property
    def quiet_s(self) -> float:
        return 0.0 if self.calls else time.monotonic() - self._changed

    def count(self, change: int) -> None:
        self.open += change
        self._changed = time.monotonic()

    def count_call(self, change: int) -> None:
        self.calls += change
        self._changed = time.monotonic()


class Use(Struct, frozen=True):
    """Reasons to stay. `vm`: there is one, or one is starting; `tasks`: there are some, running or not yet deleted;
    `reachable`: socket and bundle exist, so an engine may come back."""

    vm: bool
    tasks: bool
    connections: int
    quiet_s: float
    reachable: bool


def reason_to_end(use: Use) -> str:
    """Why the server is no longer needed; empty if it may be."""
    if use.vm or use.quiet_s < PERIOD_S:
        return ""
    if not use.connections and not use.reachable:
        return "it has no VM, and its socket or its bundle has been removed"
    if not use.tasks and use.quiet_s >= IDLE_S:
        return f"it has no VM and no task, and has had no request for {use.quiet_s:.0f} s"
    if not use.connections and use.quiet_s >= ORPHAN_S:
        return f"it has no VM, and no engine has been connected for {use.quiet_s:.0f} s"
    return ""


async def watch_use(tasks: Tasks, connections: Connections, path: str, end: Callable[[], None]) -> None:
    """Call `end` when there is a reason to. `path`: of the socket. The working directory is the bundle."""
    socket = _inode(path)
    while True:
        await asyncio.sleep(PERIOD_S)
        reachable = _inode(path) == socket and os.stat(".").st_nlink > 0  # 0: the directory has been removed
        use = Use(tasks.has_vm, not tasks.empty, connections.open, connections.quiet_s, reachable)
        if reason := reason_to_end(use):
            log.warning("ends: %s", reason)
            end()
            return


def _inode(path: str) -> int:
    try:
        return os.stat(path).st_ino
    except OSError:
        return -1
