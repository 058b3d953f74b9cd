"""The listener of the management socket: it listens from the start, and loads the server (management.py) for the first
client.

Most sandboxes never have one, and a start must not wait for those imports.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from katapod.host.tasks import beside
from katapod.model.errors import KatapodError
from katapod.sandbox.lifecycle import Sandbox

if TYPE_CHECKING:
    from katapod.host.process_metrics import CallTimes

__all__ = ["bound_listener", "management_door"]


@contextlib.contextmanager
def bound_listener(path: Path) -> Iterator[socket.socket]:
    """A listening socket for root alone; its file goes when the block ends. Raises KatapodError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as listener:
        try:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()  # left by an owner that was killed: the state directory is ours by now
            listener.bind(str(path))
            os.chmod(path, 0o600)
            listener.listen(16)
        except OSError as exc:
            raise KatapodError(f"cannot listen on {path}: {exc.strerror or exc}") from exc
        try:
            yield listener
        finally:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


@contextlib.asynccontextmanager
async def management_door(sandbox: Sandbox, call_times: "Sequence[CallTimes]" = ()) -> AsyncIterator[None]:
    """Serve the management socket of a sandbox of this process while the block runs. Raises KatapodError."""
    with bound_listener(sandbox.paths.management_socket) as listener:
        async with beside(_serve(listener, sandbox, call_times), name="management-door"):
            yield


async def _serve(listener: socket.socket, sandbox: Sandbox, call_times: "Sequence[CallTimes]") -> None:
    loop = asyncio.get_running_loop()
    client = loop.create_future()
    loop.add_reader(listener, lambda: None if client.done() else client.set_result(None))
    try:
        await client
    finally:
        loop.remove_reader(listener)
    from katapod.sandbox.management import ManagedSandbox, serve_management

    async with serve_management(ManagedSandbox(sandbox, call_times), listener):
        await loop.create_future()  # until cancelled
