"""`delete`: remove what is left of a container or sandbox, from disk alone: its server may be gone.

Source: core/runtime/v2/README.md of containerd. containerd allows five seconds.
"""

import asyncio
import contextlib
import os
import sys
import time
from pathlib import Path

from katapod.host.mounts import unmount_below
from katapod.host.state import StateStore
from katapod.model.errors import UsageError
from katapod.model.ids import parse_container_name
from katapod.model.layout import Layout
from katapod.model.record import KILLED_STATUS
from katapod.rpc.client import TtrpcClient
from katapod.rpc.status import RpcError
from katapod.sandbox.recovery import remove_sandbox
from katapod.shim.arguments import Arguments
from katapod.shim.pb import task_pb2
from katapod.shim.start import SOCKET_ROOT, StartError, pod_of, read_annotations, socket_path

__all__ = ["delete"]

OWNER_GRACE_S = 2.0  # of the five seconds
SERVER_END_S = 1.0
SERVICE = "containerd.task.v2.Task"


def delete(arguments: Arguments) -> None:
    """Print a DeleteResponse. Succeeds if nothing is left. Raises KatapodError, OSError."""
    bundle = Path(arguments.bundle)
    pod = None
    with contextlib.suppress(StartError):  # the bundle is incomplete, or gone already
        pod = pod_of(read_annotations(str(bundle / "config.json")), "config.json")
    if pod is None:
        with contextlib.suppress(UsageError):  # no sandbox was ever made with an invalid id
            sandbox_id = parse_container_name(arguments.id)
            asyncio.run(remove_sandbox(StateStore(Layout()), sandbox_id, force=True, grace_s=OWNER_GRACE_S))
        for path in _sockets(arguments, bundle):
            asyncio.run(_end_server(path))
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
    unmount_below(bundle / "rootfs")
    answer = task_pb2.DeleteResponse(exit_status=KILLED_STATUS)
    answer.exited_at.seconds, answer.exited_at.nanos = divmod(time.time_ns(), 10**9)
    sys.stdout.buffer.write(answer.SerializeToString())
    sys.stdout.buffer.flush()


async def _end_server(path: str) -> None:
    """Tell a server without a VM to exit: remove_sandbox only finds servers that own one."""
    with contextlib.suppress(OSError, RpcError):
        client = await TtrpcClient.on_unix_path(path, "the shim")
        try:
            request = task_pb2.ShutdownRequest(now=True)
            await client.call_raw(SERVICE, "Shutdown", request.SerializeToString(), SERVER_END_S)
        finally:
            client.close()


def _sockets(arguments: Arguments, bundle: Path) -> list[str]:
    """Where the server may listen: the default path, or the one that containerd asked for, recorded in the bundle."""
    usual = socket_path(SOCKET_ROOT, arguments.address, arguments.namespace, arguments.id)
    try:
        told = (bundle / "address").read_text().removeprefix("unix://")
    except (OSError, ValueError):
        return [usual]
    return [usual, told] if os.path.basename(told) == os.path.basename(usual) else [usual]
