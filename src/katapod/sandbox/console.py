"""The supervisor's end of the debug console of its sandbox: one connection, made when somebody first asks for it."""

import asyncio
import contextlib
import logging
import socket
from typing import TYPE_CHECKING

from katapod.host.vsock import connect_vsock
from katapod.rpc.agent import AgentClient
from katapod.rpc.client import TtrpcClient
from katapod.rpc.console import CONSOLE_SERVICE_VPORT, VM_ID
from katapod.rpc.pb import agent_pb2
from katapod.rpc.status import RpcError, StatusCode
from katapod.tasks import Background
from katapod.vmm.protocol import Channel

if TYPE_CHECKING:
    from katapod.vmm.protocol import VirtualMachine

__all__ = ["ConsoleLink"]

log = logging.getLogger(__name__)

DIAL_LIMIT_S = 10.0
HANG_UP_LIMIT_S = 10.0
HEALTH_LIMIT_S = 5.0
SIGHUP = 1


class ConsoleLink:
    """`sessions` counts who has a shell there."""

    def __init__(self, sandbox_id: str, vm: "VirtualMachine", vsock_cid: int | None, *, enabled: bool) -> None:
        self.enabled = enabled
        self.sessions = 0
        self._sandbox_id = sandbox_id
        self._vm = vm
        self._vsock_cid = vsock_cid
        self._connection: TtrpcClient | None = None
        self._connecting = asyncio.Lock()
        self._background = Background()

    async def connect(self) -> TtrpcClient:
        """The connection. Raises RpcError: FAILED_PRECONDITION if the console is off, UNIMPLEMENTED if the guest has
        only upstream's, raw, one."""
        if not self.enabled:
            raise RpcError(StatusCode.FAILED_PRECONDITION, f"the debug console of {self._sandbox_id} is off")
        async with self._connecting:
            if self._connection is None or self._connection.closed.done():
                sock = await self._open()
                self._connection = await TtrpcClient.on_socket(sock, f"debug console of {self._sandbox_id}")
        return self._connection

    async def _open(self) -> socket.socket:
        sock = self._vm.take_channel(Channel.DEBUG_CONSOLE)
        if sock is not None:
            return sock
        if self._vsock_cid is None:
            raise RpcError(StatusCode.UNAVAILABLE, f"the debug console of {self._sandbox_id} is broken")
        try:
            async with asyncio.timeout(DIAL_LIMIT_S):
                return await connect_vsock(self._vsock_cid, CONSOLE_SERVICE_VPORT)
        except OSError as exc:
            raise RpcError(
                StatusCode.UNIMPLEMENTED, f"the agent of {self._sandbox_id} has only a raw console: {exc}"
            ) from exc

    async def answers(self) -> bool:
        """Whether somebody is at the console, and it answers."""
        if not self.sessions or self._connection is None:
            return False
        try:
            await AgentClient(self._connection).check(HEALTH_LIMIT_S)
        except RpcError:
            return False
        return True

    def hang_up(self, exec_id: str) -> None:
        """End a process whose user has gone, if it is still there."""
        if self._connection is not None:
            self._background.start(_hang_up(self._connection, exec_id), name="hang-up")

    async def close(self) -> None:
        """Idempotent."""
        await self._background.close()
        if self._connection is not None:
            self._connection.close()
            self._connection = None


async def _hang_up(connection: TtrpcClient, exec_id: str) -> None:
    request = agent_pb2.SignalProcessRequest(container_id=VM_ID, exec_id=exec_id, signal=SIGHUP)
    with contextlib.suppress(RpcError):  # the process, or the guest, has ended
        await AgentClient(connection).call("SignalProcess", request, timeout_s=HANG_UP_LIMIT_S)
