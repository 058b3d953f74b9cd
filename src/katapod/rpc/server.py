"""A ttrpc server on an asyncio unix socket: the calls of a connection run concurrently, each in its own task.

A call with a timeout is cancelled when that expires. The stream ids of a connection must increase: a used one is
refused, since its response could be taken for another call's. Source: PROTOCOL.md of containerd/ttrpc.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable

from katapod.rpc.framing import REQUEST, Frame, FrameDecoder, FrameError, encode_response, parse_request
from katapod.rpc.status import RpcError, StatusCode
from katapod.tasks import Background

__all__ = ["Handler", "TtrpcServer", "serve_ttrpc"]

log = logging.getLogger(__name__)

Handler = Callable[[str, str, bytes], Awaitable[bytes]]
"""(service, method, payload) to payload; raises RpcError to answer with a status."""

CALLS_PER_CONNECTION_MAX = 2048
"""An engine has one connection, and up to two calls in flight on it per process: Wait, and one other."""
BACKLOG = 4096  # further clients are refused while it is full; the kernel caps it at net.core.somaxconn


async def serve_ttrpc(
    listener: socket.socket, handler: Handler, count: Callable[[int], None] | None = None
) -> "TtrpcServer":
    """Serve `handler` on a listening unix socket, which the returned server owns. `count` is called
    with 1 for each new connection and with -1 for each that ends."""
    server = TtrpcServer(handler, count or (lambda change: None))
    await server.listen(listener)
    return server


class TtrpcServer:
    """Owns a listening socket and the tasks of all calls."""

    def __init__(self, handler: Handler, count: Callable[[int], None]) -> None:
        self.handler = handler
        self.count = count
        self.connections: set[_Connection] = set()
        self.calls = Background()
        self._server: asyncio.Server | None = None

    async def listen(self, listener: socket.socket) -> None:
        listener.setblocking(False)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: _Connection(self), sock=listener, backlog=BACKLOG)

    def close(self) -> None:
        """Stop listening. Connections stay. Idempotent."""
        if self._server is not None:
            self._server.close()

    async def wait_closed(self) -> None:
        """After close: drop all connections, cancel their calls and wait for the end of these."""
        for connection in list(self.connections):
            connection.drop()
        await self.calls.close()


class _Connection(asyncio.Protocol):
    def __init__(self, server: TtrpcServer) -> None:
        self._server = server
        self._decoder = FrameDecoder()
        self._transport: asyncio.Transport | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._last_stream_id = 0
        self._writable = asyncio.Event()
        self._writable.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._server.connections.add(self)
        self._server.count(1)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        self._server.count(-1)
        self._writable.set()
        for task in self._tasks:
            task.cancel()

    def drop(self) -> None:
        """Break the connection: connection_lost, which follows, cancels the calls."""
        if self._transport is not None:
            self._transport.abort()

    def pause_writing(self) -> None:
        """A peer that does not read its responses is not read from: refusals would pile up without limit."""
        self._writable.clear()
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._writable.set()
        if self._transport is not None:
            self._transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        try:
            frames = self._decoder.feed(data)
        except FrameError as exc:
            log.warning("client dropped: %s", exc)
            self._transport.abort()
            return
        for frame in frames:
            if refused := self._admit(frame):
                self._transport.write(encode_response(frame.stream_id, code=refused.code, message=refused.message))
                continue
            task = self._server.calls.start(self._answer(frame), name=f"ttrpc-{frame.stream_id}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _admit(self, frame: Frame) -> RpcError | None:
        """Why a frame is refused; None if it is not."""
        if len(self._tasks) >= CALLS_PER_CONNECTION_MAX:
            message = f"more than {CALLS_PER_CONNECTION_MAX} calls are in flight"
            return RpcError(StatusCode.RESOURCE_EXHAUSTED, message)
        if frame.kind == REQUEST and frame.stream_id % 2 and not frame.oversized:
            if frame.stream_id <= self._last_stream_id:
                message = f"stream id {frame.stream_id} after {self._last_stream_id}: ids must increase"
                return RpcError(StatusCode.INVALID_ARGUMENT, message)
            self._last_stream_id = frame.stream_id
        return None

    async def _answer(self, frame: Frame) -> None:
        try:
            request = parse_request(frame)
            payload = await self._call(request.service, request.method, request.payload, request.timeout_nano)
            answer = encode_response(frame.stream_id, payload)
        except RpcError as exc:
            answer = encode_response(frame.stream_id, code=exc.code, message=exc.message)
        except asyncio.CancelledError:
            raise
        except Exception as exc:
            log.exception("unexpected error in a call")
            answer = encode_response(frame.stream_id, code=StatusCode.INTERNAL, message=repr(exc))
        await self._writable.wait()
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(answer)

    async def _call(self, service: str, method: str, payload: bytes, timeout_nano: int) -> bytes:
        """Call the handler within the caller's timeout: nanoseconds, 0 for none; a negative one has expired already."""
        if not timeout_nano:
            return await self._server.handler(service, method, payload)
        over = RpcError(StatusCode.DEADLINE_EXCEEDED, f"{method} timed out after {timeout_nano / 1e9:g} s")
        if timeout_nano < 0:
            raise over
        limit = asyncio.timeout(timeout_nano / 1e9)
        try:
            async with limit:
                return await self._server.handler(service, method, payload)
        except TimeoutError as exc:
            if limit.expired():
                raise over from exc
            raise
