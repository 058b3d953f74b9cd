"""`exec` in a container of a sandbox that somebody holds: this process or another."""

import contextlib
from collections.abc import AsyncIterator

from katapod.host.state import StateStore
from katapod.model.errors import KatapodError, NotFound
from katapod.rpc.status import RpcError
from katapod.sandbox.client import connect_control, why_cut_off
from katapod.sandbox.execs import ExecRequest, exec_in, spec_on_disk
from katapod.sandbox.stdio import GuestProcess

__all__ = ["started_exec"]


@contextlib.asynccontextmanager
async def started_exec(
    store: StateStore, name: str, sandbox_id: str, container_id: str, request: ExecRequest
) -> AsyncIterator[GuestProcess]:
    """Start it; `name` is what the caller calls the container. A broken link becomes a KatapodError with its cause.

    Raises NotFound, InvalidState, and as exec_in.
    """
    async with connect_control(store, sandbox_id) as client:
        spec = spec_on_disk(client.paths, container_id)
        if spec is None:
            raise NotFound(f"cannot exec in container {name}: it has ended")
        try:
            running = await exec_in(client.agent, client.record, container_id, spec, request)
        except NotFound as exc:
            cause = await why_cut_off(client, exc, "it has ended")
            raise NotFound(f"cannot exec in container {name}: {cause}") from exc
        try:
            yield running
        except RpcError as exc:
            cause = await why_cut_off(client, exc, "the container has ended")
            raise KatapodError(f"the command in {name} was cut off: {cause}") from exc
