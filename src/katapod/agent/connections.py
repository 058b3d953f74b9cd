"""Connections to the guest's loopback on behalf of the host: the guest's part of port-forward.

Nothing is read from a connection before the host asks, and a write is answered when all of it has been accepted, so
that flow control works end to end.
"""

from __future__ import annotations

import _socket
import errno
import os
import struct

from katapod.agent.loop import Lock
from katapod.rpc.pb import katapod_pb2
from katapod.rpc.status import RpcError, StatusCode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from katapod.agent.loop import Loop

    class Agent(Protocol):
        """What is needed of sandbox.Agent, which imports this module."""

        loop: Loop

        @property
        def connections(self) -> Connections: ...


__all__ = ["CONNECTIONS_MAX", "Connections", "connect", "disconnect", "receive", "send"]

CONNECTIONS_MAX = 128
CONNECT_LIMIT_S = 10.0  # for a listener with a full queue
RECEIVE_MAX = 256 * 1024  # bytes of one Receive, however many are asked for
LOOPBACK6 = bytes(15) + b"\1"
_RESET = struct.pack("ii", 1, 0)  # struct linger


class Connection:
    """Only Connections.close closes `socket`; it also wakes tasks that wait for it."""

    def __init__(self, socket: _socket.socket) -> None:
        self.socket = socket
        self.closed = False
        self.sending = Lock()


class Connections:
    """All connections, by the ids that the host has chosen."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self._open: dict[int, Connection] = {}

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection_id: int, connection: Connection) -> None:
        self._open[connection_id] = connection

    def find(self, connection_id: int) -> Connection:
        """Raises RpcError (NOT_FOUND)."""
        found = self._open.get(connection_id)
        if found is None:
            raise RpcError(StatusCode.NOT_FOUND, f"no such connection: {connection_id}")
        return found

    def check_free(self, connection_id: int) -> None:
        """Raises RpcError if the id is in use, or there are too many connections."""
        if connection_id in self._open:
            raise RpcError(StatusCode.ALREADY_EXISTS, f"connection {connection_id} already exists")
        if len(self._open) >= CONNECTIONS_MAX:
            raise RpcError(StatusCode.RESOURCE_EXHAUSTED, f"too many connections ({CONNECTIONS_MAX})")

    def close(self, connection_id: int, *, reset: bool = False) -> None:
        """Idempotent."""
        found = self._open.pop(connection_id, None)
        if found is None:
            return
        found.closed = True
        if reset:
            found.socket.setsockopt(_socket.SOL_SOCKET, _socket.SO_LINGER, _RESET)
        self.loop.forget(found.socket.fileno())
        found.socket.close()


async def connect(agent: Agent, request: katapod_pb2.ConnectRequest) -> katapod_pb2.ConnectResponse:
    address, port = _parse_address(request.address), request.port
    if not 0 < port < 65536:
        raise RpcError(StatusCode.INVALID_ARGUMENT, f"cannot connect: invalid port {port}")
    connections, connection_id = agent.connections, request.connection_id
    connections.check_free(connection_id)
    family = _socket.AF_INET6 if len(request.address) == 16 else _socket.AF_INET
    try:
        socket = _socket.socket(family, _socket.SOCK_STREAM | _socket.SOCK_NONBLOCK | _socket.SOCK_CLOEXEC)
    except OSError as exc:  # the guest lacks that address family: nothing can listen there
        raise RpcError(StatusCode.NOT_FOUND, f"cannot connect to {address} port {port}: {exc.strerror}") from exc
    connection = Connection(socket)
    connections.add(connection_id, connection)
    try:
        error = socket.connect_ex((address, port))
        if error == errno.EINPROGRESS:
            made = await agent.loop.writable(socket.fileno(), CONNECT_LIMIT_S)
            if connection.closed:
                raise _gone(connection_id)
            error = socket.getsockopt(_socket.SOL_SOCKET, _socket.SO_ERROR) if made else errno.ETIMEDOUT
        if error:
            code = StatusCode.DEADLINE_EXCEEDED if error == errno.ETIMEDOUT else StatusCode.NOT_FOUND
            raise RpcError(code, f"cannot connect to {address} port {port}: {os.strerror(error)}")
        socket.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)
    except BaseException:
        if not connection.closed:
            connections.close(connection_id)
        raise
    return katapod_pb2.ConnectResponse()


def _parse_address(packed: bytes) -> str:
    """A loopback address as text. Raises RpcError."""
    if packed == LOOPBACK6:
        return "::1"
    if len(packed) == 4 and packed[0] == 127:
        return _socket.inet_ntop(_socket.AF_INET, packed)
    raise RpcError(StatusCode.INVALID_ARGUMENT, f"cannot connect to {packed[:32].hex()}: not a loopback address")


def _gone(connection_id: int) -> RpcError:
    return RpcError(StatusCode.NOT_FOUND, f"connection {connection_id} has been closed")


async def receive(agent: Agent, request: katapod_pb2.ReceiveRequest) -> katapod_pb2.ReceiveResponse:
    """Blocks; empty at the end. ABORTED if the peer has reset the connection."""
    connection = agent.connections.find(request.connection_id)
    size = max(1, min(request.len, RECEIVE_MAX))
    while not connection.closed:
        try:
            return katapod_pb2.ReceiveResponse(data=connection.socket.recv(size))
        except BlockingIOError:
            await agent.loop.readable(connection.socket.fileno())
        except OSError as exc:
            raise RpcError(StatusCode.ABORTED, f"the connection broke: {exc.strerror}") from exc
    raise _gone(request.connection_id)


async def send(agent: Agent, request: katapod_pb2.SendRequest) -> katapod_pb2.SendResponse:
    connection = agent.connections.find(request.connection_id)
    view = memoryview(request.data)
    async with connection.sending:
        while not connection.closed:
            try:
                if not request.data:
                    connection.socket.shutdown(_socket.SHUT_WR)
                elif view:
                    view = view[connection.socket.send(view) :]
                if not view:
                    return katapod_pb2.SendResponse()
            except BlockingIOError:
                await agent.loop.writable(connection.socket.fileno())
            except OSError as exc:
                raise RpcError(StatusCode.ABORTED, f"the connection broke: {exc.strerror}") from exc
    raise _gone(request.connection_id)


async def disconnect(agent: Agent, request: katapod_pb2.DisconnectRequest) -> katapod_pb2.DisconnectResponse:
    agent.connections.close(request.connection_id, reset=request.reset)
    return katapod_pb2.DisconnectResponse()
