"""The restart policy of a container, held by the process that has it: when it is started again, and the wait before.

Between two runs the container is at rest on record, which says until when; this process holds its lock meanwhile, so
that nobody else starts or removes it unasked. Who stops it ends the wait (sandbox/endings.py). Docker's figures.
"""

import asyncio
import contextlib
import os
import time

from msgspec.structs import replace

from katapod.host.state import StateStore
from katapod.model.errors import InvalidState, KatapodError, NotFound
from katapod.model.record import SandboxRecord
from katapod.supervisor.run_request import RunRequest

__all__ = ["Backoff", "next_run"]

FIRST_S, MOST_S = 0.1, 60.0
STEADY_S = 10.0  # a container that has run so long was well


class Backoff:
    """How long to wait before each start: twice as long as before the last one."""

    def __init__(self) -> None:
        self._last_s = 0.0

    def after(self, ran_s: float) -> float:
        self._last_s = FIRST_S if ran_s >= STEADY_S or not self._last_s else min(2 * self._last_s, MOST_S)
        return self._last_s


async def next_run(store: StateStore, request: RunRequest, exit_code: int, delay_s: float) -> RunRequest | None:
    """What starts the container again that has ended with `exit_code`, once `delay_s` have passed; None if it is not to
    be started again. Raises KatapodError; CancelledError if the wait is ended by a signal."""
    try:
        record = store.read(request.container_id)
    except NotFound:
        return None
    if record.stop_asked or not request.restart.wants(exit_code, record.restarts):
        return None
    waiting = replace(record, restart_at=time.time() + delay_s, supervisor_pid=os.getpid())
    try:
        lock = store.reclaim(waiting)
    except (NotFound, InvalidState):  # it was removed, or stopped, in the moment when nobody had it
        return None
    try:
        await asyncio.sleep(delay_s)
        _note_end_of_wait(store, record.sandbox_id)
    except asyncio.CancelledError:
        with contextlib.suppress(KatapodError):
            _note_end_of_wait(store, record.sandbox_id)
        raise
    finally:
        os.close(lock)
    again = replace(request, again=True, image_digest=_digest_of(record), restarts=record.restarts + 1)
    return replace(again, replace=False, cid_file=None)


def _note_end_of_wait(store: StateStore, sandbox_id: str) -> None:
    with store.removal(sandbox_id):
        store.write(replace(store.read(sandbox_id), restart_at=0.0))


def _digest_of(record: SandboxRecord) -> str:
    return record.containers[0].image_digest if record.containers else ""
