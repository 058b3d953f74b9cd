"""The management server on a socket of its own, over whatever stands for a sandbox."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from katapod.host.listener import bound_listener
from katapod.observe.management import ObservedSandbox, serve_management

__all__ = ["management_socket"]


@contextlib.asynccontextmanager
async def management_socket(managed: ObservedSandbox, path: Path) -> AsyncIterator[None]:
    """Serve on `path` while the block runs."""
    with bound_listener(path) as listener:
        async with serve_management(managed, listener):
            yield
