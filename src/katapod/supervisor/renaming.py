"""Another name for a container at rest: its directories, its image and its request have it then."""

import asyncio
import os

from msgspec.structs import replace

from katapod.host.event_log import note_event
from katapod.host.removal import clear_away
from katapod.host.state import StateStore, supervisor_alive
from katapod.images import ImageStore
from katapod.model.errors import InvalidState, KatapodError
from katapod.model.ids import ContainerId
from katapod.model.record import SandboxRecord
from katapod.sandbox.recovery import rested
from katapod.supervisor.kept import keep_request, read_kept

__all__ = ["rename_container"]


async def rename_container(store: StateStore, old: ContainerId, new: ContainerId) -> None:
    """The new name is taken first and the old one given up last: killed in between, one of the two has all of it, and
    the other one is a record that can be deleted.

    Raises NotFound, InvalidState if it runs, AlreadyExists, NoSpace, KatapodError.
    """
    record = store.read(old)
    if supervisor_alive(store.layout.sandbox(old)):
        raise InvalidState(
            f"cannot rename container {old}: it runs, and its VM has its name", hint=f"kata-runtime stop {old} first"
        )
    record = await rested(store, old)
    kept = read_kept(store.layout, old)
    lock = store.reclaim(replace(record, restarts=0))
    try:
        if kept.image_digest:
            await ImageStore(store.layout.image_root).hold(kept.image_digest, new)
        try:
            made = store.create(_renamed(record, new))
        except KatapodError:
            await _release(store, new)
            raise
        try:
            await asyncio.to_thread(_move, store, old, new)
            keep_request(store.layout, replace(kept, request=replace(kept.request, container_id=new)))
            store.keep(_renamed(record, new))
        finally:
            os.close(made)
        store.discard(old)
        await _release(store, old)
    finally:
        os.close(lock)
    note_event(store.layout, "rename", _renamed(record, new), oldName=old)


def _renamed(record: SandboxRecord, new: ContainerId) -> SandboxRecord:
    containers = tuple(replace(item, container_id=new) for item in record.containers)
    return replace(record, sandbox_id=new, containers=containers)


def _move(store: StateStore, old: ContainerId, new: ContainerId) -> None:
    """Raises KatapodError; then nothing has been moved."""
    before, after = store.layout.sandbox(old), store.layout.sandbox(new)
    try:
        clear_away(store.layout, after.data)  # a leftover: the name was free
        os.rename(before.data, after.data)
    except (OSError, KatapodError) as exc:
        store.discard(new)
        raise KatapodError(f"cannot rename container {old}: {exc}") from exc
    for source, target in ((before.spec(old), after.spec(new)), (before.console_log, after.console_log)):
        if source.exists():
            os.rename(source, target)


async def _release(store: StateStore, container_id: ContainerId) -> None:
    await ImageStore(store.layout.image_root).release(container_id)
