"""The removal of a sandbox that somebody names: what does not run goes, what runs only if that is said."""

import asyncio

from katapod.host.state import StateStore, supervisor_alive
from katapod.model.errors import InvalidState, NotFound
from katapod.sandbox.endings import until_supervisor_ended
from katapod.sandbox.recovery import remove_sandbox

__all__ = ["delete_sandbox"]

ENDING_LIMIT_S = 60.0


async def delete_sandbox(store: StateStore, sandbox_id: str, *, force: bool = False) -> bool:
    """Remove all that a sandbox has on this machine; returns whether it had anything. With `force` what still runs is
    ended first, and one that is not there is no error.

    Raises NotFound, InvalidState if it runs, and as remove_sandbox.
    """
    paths = store.layout.sandbox(sandbox_id)
    if not any(path.exists() for path in paths.all):
        if force:
            return False
        raise NotFound(f"cannot delete {sandbox_id}: no such container", hint="see: kata-runtime list")
    if supervisor_alive(paths) and not force and not await _ends(store, sandbox_id):
        raise InvalidState(
            f"cannot delete {sandbox_id}: it is running",
            hint=f"kata-runtime delete --force {sandbox_id} kills it first",
        )
    await remove_sandbox(store, sandbox_id, force=force)
    return True


async def _ends(store: StateStore, sandbox_id: str) -> bool:
    """Whether the supervisor of what `list` shows as stopped has ended soon after."""
    record = store.read(sandbox_id)
    if not record.is_over or record.restart_at:
        return False
    try:
        async with asyncio.timeout(ENDING_LIMIT_S):
            await until_supervisor_ended(store.layout.sandbox(sandbox_id))
    except TimeoutError:
        return False
    return True
