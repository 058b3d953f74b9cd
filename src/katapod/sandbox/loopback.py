"""Connections to the loopback of a pod's network namespace on the host, carried to the loopback of its guest.

Container engines forward ports (`kubectl port-forward`) by a connection to localhost inside the namespace, where they
believe the pod's processes. We accept it, have the agent connect in the guest, and carry bytes between the two: one
chunk at a time in each direction, so that who does not read stalls the other end.
"""

import asyncio
import contextlib
import itertools
import logging
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path

from katapod.host.loopback import LoopbackListener, listen_on_loopback
from katapod.rpc.agent import AgentClient
from katapod.rpc.status import RpcError, StatusCode
from katapod.sandbox.lifecycle import Sandbox
from katapod.tasks import Background, beside, finish

__all__ = ["CONNECTIONS_MAX", "listening_on_loopback", "serving_loopback"]

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 64  # at a time: each takes up to two of the calls that a sandbox may have in flight
CHUNK_MAX = 256 * 1024  # bytes for one call
IN_FLIGHT_BYTES = 4 << 20  # of all connections in one direction, more or less; the agent holds 16 MiB of requests
CONNECT_LIMIT_S = 15.0  # the agent's own is 10
DISCONNECT_LIMIT_S = 5.0
PAUSE_S = 0.1  # after an accept that failed
LOOPBACK, LOOPBACK6 = bytes([127, 0, 0, 1]), bytes(15) + b"\1"
_RESET = struct.pack("ii", 1, 0)  # struct linger


@contextlib.asynccontextmanager
async def listening_on_loopback(
    netns: Path | None, level: int = logging.WARNING
) -> AsyncIterator["asyncio.Task[LoopbackListener | None]"]:
    """Listen while the block runs, which does not wait for it. A host that cannot says so in the log, at `level`."""
    found: list[LoopbackListener] = []
    try:
        async with beside(_listen(netns, level, found), name="listen-on-loopback") as task:
            yield task
    finally:
        for listener in found:
            listener.close()


@contextlib.asynccontextmanager
async def serving_loopback(sandbox: Sandbox, listener: LoopbackListener | None) -> AsyncIterator[None]:
    """Carry what it accepts while the block runs; what is under way at its end is reset, and it is closed."""
    if listener is None:
        yield
        return
    forwarder = _Forwarder(sandbox.agent, sandbox.sandbox_id)
    try:
        async with Background() as serving:
            for each in listener.sockets:
                serving.start(forwarder.serve(each), name="loopback-server")
            yield
    finally:
        try:
            await forwarder.close()
        finally:
            listener.close()


async def _listen(netns: Path | None, level: int, found: list[LoopbackListener]) -> LoopbackListener | None:
    """Adds to `found` what is open, also when we are cancelled: a thread goes on until it has opened it."""
    if netns is None:
        return None
    try:
        await finish(asyncio.to_thread(lambda: found.append(listen_on_loopback(netns))), name="open-loopback")
    except OSError as exc:
        log.log(level, "connections to the loopback of %s will be refused, and so will port-forwarding: %s", netns, exc)
    return found[0] if found else None


class _Forwarder:
    def __init__(self, agent: AgentClient, sandbox_id: str) -> None:
        self._agent = agent
        self._sandbox_id = sandbox_id
        self._ids = itertools.count(1)
        self._carrying: dict[int, asyncio.Task[None]] = {}
        self._half_closed: dict[int, None] = {}  # by their clients, who may have gone; the oldest first
        self._background = Background()
        self._closed = False

    @property
    def _chunk_bytes(self) -> int:
        """For the next call of a connection: what stands in the agent must leave room for other calls."""
        return min(CHUNK_MAX, IN_FLIGHT_BYTES // max(1, len(self._carrying)))

    async def close(self) -> None:
        """Reset what is under way. The guest is not told: it ends next."""
        self._closed = True
        await self._background.close()

    async def serve(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, _ = await loop.sock_accept(listener)
            except OSError as exc:
                log.warning("cannot accept a connection to the loopback of %s: %s", self._sandbox_id, exc)
                await asyncio.sleep(PAUSE_S)
                continue
            if len(self._carrying) >= CONNECTIONS_MAX and not self._drop_oldest():
                log.warning("sandbox %s has %d forwarded connections already", self._sandbox_id, CONNECTIONS_MAX)
                _reset(client)
                continue
            connection_id = next(self._ids)
            work = self._carry(connection_id, client)
            self._carrying[connection_id] = self._background.start(work, name=f"forward-{connection_id}")

    def _drop_oldest(self) -> bool:
        """Give up the oldest connection whose client has ended its stream. False: there is none."""
        oldest = next(iter(self._half_closed), None)
        if oldest is None:
            return False
        self._forget(oldest).cancel()
        return True

    def _forget(self, connection_id: int) -> asyncio.Task[None]:
        self._half_closed.pop(connection_id, None)
        return self._carrying.pop(connection_id)

    async def _carry(self, connection_id: int, client: socket.socket) -> None:
        """To the end of both directions."""
        broken = True
        try:
            await self._connect(connection_id, client)
            async with asyncio.TaskGroup() as group:
                whole = group.create_task(self._to_guest(connection_id, client))
                group.create_task(self._to_client(connection_id, client))
            broken = not whole.result()
        except* (RpcError, OSError) as group_error:
            log.debug(
                "connection %d to the loopback of %s: %s", connection_id, self._sandbox_id, group_error.exceptions
            )
        finally:
            if broken:
                _reset(client)
            client.close()
            if connection_id in self._carrying:
                self._forget(connection_id)
            if not self._closed:
                work = self._disconnect(connection_id, reset=broken)
                self._background.start(work, name=f"disconnect-{connection_id}")

    async def _connect(self, connection_id: int, client: socket.socket) -> None:
        """Where the client wants to go, else to the other family's loopback: clients try IPv4 first and, since we have
        accepted that, would never come to a server that has IPv6 only. Raises RpcError, OSError."""
        address, port = client.getsockname()[:2]
        try:
            await self._agent.connect(connection_id, socket.inet_pton(client.family, address), port, CONNECT_LIMIT_S)
        except RpcError as exc:
            if exc.code is not StatusCode.NOT_FOUND:
                log.warning("cannot forward a connection to port %d of %s: %s", port, self._sandbox_id, exc.message)
                raise
            other = LOOPBACK if client.family == socket.AF_INET6 else LOOPBACK6
            await self._agent.connect(connection_id, other, port, CONNECT_LIMIT_S)

    async def _to_guest(self, connection_id: int, client: socket.socket) -> bool:
        """Returns whether the guest has taken all. If it takes no more, what it sends is still for the client."""
        loop = asyncio.get_running_loop()
        try:
            while data := await loop.sock_recv(client, self._chunk_bytes):
                await self._agent.send(connection_id, data)
            self._half_closed[connection_id] = None
            await self._agent.send(connection_id, b"")
        except RpcError as exc:
            if exc.code is not StatusCode.ABORTED:
                raise
            return False
        return True

    async def _to_client(self, connection_id: int, client: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while data := await self._agent.receive(connection_id, self._chunk_bytes):
            await loop.sock_sendall(client, data)
        client.shutdown(socket.SHUT_WR)

    async def _disconnect(self, connection_id: int, *, reset: bool) -> None:
        with contextlib.suppress(RpcError):  # the guest may be dead
            await self._agent.disconnect(connection_id, reset=reset, timeout_s=DISCONNECT_LIMIT_S)


def _reset(client: socket.socket) -> None:
    """Close, and let the other end know that the stream broke."""
    with contextlib.suppress(OSError):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    client.close()
