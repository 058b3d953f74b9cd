"""What a sandbox leaves behind whose server may be gone: for `delete` of the shim."""

import asyncio
import contextlib
import os

from katapod.host.state import StateStore
from katapod.model.errors import UsageError
from katapod.model.ids import parse_container_name
from katapod.model.layout import Layout
from katapod.rpc.client import TtrpcClient
from katapod.rpc.status import RpcError
from katapod.sandbox.recovery import remove_sandbox
from katapod.shim.pb import task_pb2

__all__ = ["remove_leftovers"]

OWNER_GRACE_S = 2.0  # of the five seconds that containerd allows
SERVER_END_S = 1.0
SERVICE = "containerd.task.v2.Task"


def remove_leftovers(sandbox_id: str, sockets: list[str]) -> None:
    """The sandbox, and the server that may listen on one of the sockets. Raises KatapodError, OSError."""
    with contextlib.suppress(UsageError):  # no sandbox was ever made with an invalid id
        name = parse_container_name(sandbox_id)
        asyncio.run(remove_sandbox(StateStore(Layout()), name, force=True, grace_s=OWNER_GRACE_S))
    for path in sockets:
        asyncio.run(_end_server(path))
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


async def _end_server(path: str) -> None:
    """Tell a server without a VM to exit: remove_sandbox only finds servers that own one."""
    with contextlib.suppress(OSError, RpcError):
        client = await TtrpcClient.on_unix_path(path, "the shim")
        try:
            request = task_pb2.ShutdownRequest(now=True)
            await client.call_raw(SERVICE, "Shutdown", request.SerializeToString(), SERVER_END_S)
        finally:
            client.close()
