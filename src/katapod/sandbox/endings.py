"""The end of the process that owns a sandbox, waited for or asked for by another one."""

import asyncio
import contextlib
import os
import signal

from msgspec.structs import replace

from katapod.host.locks import lock_holder
from katapod.host.state import StateStore, supervisor_alive
from katapod.model.errors import NotFound
from katapod.model.layout import SandboxPaths
from katapod.model.record import State

__all__ = ["end_policy", "note_stop", "until_supervisor_ended"]

ASK_EVERY_S = 0.02


async def until_supervisor_ended(paths: SandboxPaths) -> None:
    """Nobody tells of the end of a process that is not ours: its lock is looked at."""
    while supervisor_alive(paths):  # noqa: ASYNC110 - it is another process
        await asyncio.sleep(ASK_EVERY_S)


async def end_policy(store: StateStore, sandbox_id: str) -> bool:
    """Have a container that does not run not be started again by its policy: its supervisor, which waits for that or
    has begun with it, ends. Returns whether there was such a one. Raises NotFound, KatapodError."""
    paths = store.layout.sandbox(sandbox_id)
    with store.removal(sandbox_id):
        record = store.read(sandbox_id)
        starts = bool(record.restarts) and (record.state is State.CREATING or not record.containers)
        if not record.at_rest and not starts:
            return False
    note_stop(store, sandbox_id)  # also for one that is between its wait and its start
    if not record.restart_at and not starts:
        return False
    holder = lock_holder(paths.lock)
    if holder is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(holder, signal.SIGTERM)
    await until_supervisor_ended(paths)
    note_stop(store, sandbox_id)
    return True


def note_stop(store: StateStore, sandbox_id: str, *, asked: bool = True) -> None:
    """Have it on record of a container at rest, one that has a policy, whether somebody has asked for its end. One
    that has gone has none. Raises KatapodError."""
    with store.removal(sandbox_id) as there, contextlib.suppress(NotFound):
        record = store.read(sandbox_id) if there else None
        if record is None or not record.at_rest or record.restart == "no" or record.stop_asked == asked:
            return
        record = replace(record, stop_asked=asked)
        store.write(record)
        if store.kept(sandbox_id) is not None:
            store.keep(record)
