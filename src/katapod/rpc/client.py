"""A ttrpc client on an asyncio connection: many calls in flight, answers in any order."""

import asyncio
import socket
import time
from typing import Protocol, TypeVar

from katapod.model.plain import LINES, plain
from katapod.rpc.framing import (
    RESPONSE,
    FrameDecoder,
    FrameError,
    encode_request,
    parse_response,
)
from katapod.rpc.status import RpcError, StatusCode

__all__ = ["TtrpcClient"]


class Message(Protocol):
    def SerializeToString(self) -> bytes: ...  # noqa: N802


_Response = TypeVar("_Response", bound=Message)


class TtrpcClient(asyncio.Protocol):
    """One connection. When it breaks, all pending calls fail with UNAVAILABLE, and so do later ones."""

    def __init__(self, peer: str) -> None:
        """`peer` names the other side in errors, e.g. "agent of sandbox s1"."""
        self._peer = peer
        self._decoder = FrameDecoder()
        self._transport: asyncio.Transport | None = None
        self._next_stream_id = 1
        self.heard_at = time.monotonic()  # when the peer last sent anything
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._writable = asyncio.Event()
        self._writable.set()
        self.closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @classmethod
    async def on_socket(cls, sock: socket.socket, peer: str) -> "TtrpcClient":
        """Serve calls over a connected stream socket; the client owns and closes it."""
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        _, client = await loop.create_connection(lambda: cls(peer), sock=sock)
        return client

    @classmethod
    async def on_unix_path(cls, path: str, peer: str) -> "TtrpcClient":
        """Connect to a unix socket. Raises OSError."""
        _, client = await asyncio.get_running_loop().create_unix_connection(lambda: cls(peer), path)
        return client

    async def call_raw(self, service: str, method: str, payload: bytes, timeout_s: float | None) -> bytes:
        """Make one call with serialized messages.

        Raises RpcError: the peer's own, DEADLINE_EXCEEDED after `timeout_s` (None waits indefinitely), or
        UNAVAILABLE when the connection is or becomes closed.
        """
        if self.closed.done() or self._transport is None:
            raise self._unavailable(method)
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        stream_id = 0
        try:
            async with asyncio.timeout(timeout_s):
                while not self._writable.is_set():  # others may have filled the buffer again meanwhile
                    await self._writable.wait()
                if self.closed.done():
                    raise self._unavailable(method)
                # not before: ids must increase in the order of sending, or the agent on a serial port,
                # which sees no connections, takes us for another host and drops all calls
                stream_id = self._next_stream_id
                frame = encode_request(stream_id, service, method, payload, int((timeout_s or 0) * 1e9))
                self._next_stream_id += 2
                self._waiting[stream_id] = answer
                self._transport.write(frame)
                return await answer
        except TimeoutError as exc:
            if answer.done() and not answer.cancelled():
                return answer.result()  # the loop woke up late: the response and the timeout were there together
            raise RpcError(
                StatusCode.DEADLINE_EXCEEDED,
                f"{self._peer}: {method} was not answered within {timeout_s:g} s",
            ) from exc
        finally:
            self._waiting.pop(stream_id, None)

    async def call(
        self, service: str, method: str, request: Message, answer: type[_Response], timeout_s: float | None
    ) -> _Response:
        """Make one call with messages; errors as in call_raw."""
        payload = await self.call_raw(service, method, request.SerializeToString(), timeout_s)
        try:
            return answer.FromString(payload)  # type: ignore[attr-defined, no-any-return]
        except Exception as exc:
            raise RpcError(StatusCode.INTERNAL, f"{self._peer}: cannot parse the answer to {method}: {exc}") from exc

    def close(self) -> None:
        """Close the connection; pending calls fail with UNAVAILABLE. Idempotent."""
        if self._transport is not None:
            self._transport.close()
        self._fail("the connection was closed")

    def _unavailable(self, method: str) -> RpcError:
        cause = self.closed.result() if self.closed.done() else "it is not connected"
        return RpcError(StatusCode.UNAVAILABLE, f"{self._peer}: cannot call {method}: {cause}")

    def _fail(self, cause: str) -> None:
        if not self.closed.done():
            self.closed.set_result(cause)
        self._writable.set()
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(RpcError(StatusCode.UNAVAILABLE, f"{self._peer}: {cause}"))
                future.exception()  # the call may have ended for another reason: this is not an error then

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(f"the connection broke: {exc}" if exc else "the connection was closed by the peer")

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        self.heard_at = time.monotonic()
        try:
            frames = self._decoder.feed(data)
        except FrameError as exc:
            self._fail(str(exc))
            if self._transport is not None:
                self._transport.abort()
            return
        for frame in frames:
            future = self._waiting.get(frame.stream_id)
            # a response without a pending call belongs to one that timed out
            if frame.kind != RESPONSE or future is None or future.done():
                continue
            try:
                future.set_result(parse_response(frame))
            except RpcError as error:
                future.set_exception(RpcError(error.code, plain(error.message, keep=LINES)))
                future.exception()  # as in _fail
