"""The listener of the management socket: it listens from the start, and loads the server (management.py) for the first
client.

Most sandboxes never have one, and a start must not wait for those imports.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from katapod.host.listener import bound_listener
from katapod.sandbox.lifecycle import Sandbox
from katapod.tasks import beside

if TYPE_CHECKING:
    from katapod.rpc.call_times import CallTimes

__all__ = ["management_server"]


@contextlib.asynccontextmanager
async def management_server(sandbox: Sandbox, call_times: "Sequence[CallTimes]" = ()) -> AsyncIterator[None]:
    """Serve the management socket of a sandbox of this process while the block runs. Raises KatapodError."""
    with bound_listener(sandbox.paths.management_socket) as listener:
        async with beside(_serve(listener, sandbox, call_times), name="management-server"):
            yield


async def _serve(listener: socket.socket, sandbox: Sandbox, call_times: "Sequence[CallTimes]") -> None:
    loop = asyncio.get_running_loop()
    client = loop.create_future()
    loop.add_reader(listener, lambda: None if client.done() else client.set_result(None))
    try:
        await client
    finally:
        loop.remove_reader(listener)
    from katapod.observe.management import ManagedSandbox, serve_management

    async with serve_management(ManagedSandbox(sandbox, call_times), listener):
        await loop.create_future()  # until cancelled
