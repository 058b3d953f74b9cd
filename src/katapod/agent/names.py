"""Queries of the guest's programs to a name server on the host's side of their network namespace.

Engines have a name server at a loopback address of a container's network namespace, which the guest's own loopback
hides. A BPF program names our sockets for port 53 of that address, so that the port itself stays free: a container may
well be a name server, and listen there at all addresses. The host asks for the queries, and answers them.
"""

from __future__ import annotations

import _socket
import collections
import errno
import os
import struct

from katapod.agent import log
from katapod.agent.loop import Event, Future, Tasks
from katapod.kernel.bpf import Target, attach_lookup
from katapod.rpc.pb import katapod_pb2
from katapod.rpc.status import RpcError, StatusCode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    from katapod.agent.loop import Loop

    class Agent(Protocol):
        """What is needed of sandbox.Agent, which imports this module."""

        loop: Loop

        @property
        def names(self) -> Names: ...


__all__ = ["QUERIES_MAX", "STREAMS_MAX", "Names", "answer_query", "next_query", "take_names"]

PORT = 53
QUERIES_MAX = 64  # that nobody has answered yet
STREAMS_MAX = 32
STREAM_LIMIT_S = 30.0  # for the next query of a stream, and for its answer
BACKLOG = 16
MESSAGE_MAX = 65535  # bytes; RFC 1035, 4.2.2
NETNS = "/proc/self/ns/net"
_PAUSE_S = 0.1  # after an accept that failed


class _Query:
    """`client` of a packet; `answered` of a stream."""

    __slots__ = ("answered", "client", "message")

    def __init__(self, message: bytes, client: tuple[str, int] | None = None) -> None:
        self.message = message
        self.client = client
        self.answered = Future()


class Names:
    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._tasks = Tasks(loop, "names")
        self._streams = Tasks(loop, "name-streams")
        self._open: collections.OrderedDict[int, _Query] = collections.OrderedDict()
        self._waiting: collections.deque[int] = collections.deque()
        self._arrived = Event()
        self._count = 0
        self._sender: _socket.socket | None = None
        self.address = b""

    def take(self, address: bytes) -> None:
        """From now on, until the guest ends. Raises OSError."""
        made: list[_socket.socket] = []
        try:
            for kind in (_socket.SOCK_DGRAM, _socket.SOCK_STREAM):
                made.append(_socket.socket(_socket.AF_INET, kind | _socket.SOCK_NONBLOCK | _socket.SOCK_CLOEXEC))
                made[-1].bind((_socket.inet_ntoa(address), 0))
            packets, listener = made
            listener.listen(BACKLOG)
            # answers come from another port than we are bound to: they are sent by a socket that has none
            kind = _socket.SOCK_RAW | _socket.SOCK_CLOEXEC
            made.append(_socket.socket(_socket.AF_INET, kind, _socket.IPPROTO_RAW))
            netns = os.open(NETNS, os.O_RDONLY | os.O_CLOEXEC)
            try:
                attach_lookup(  # the descriptor is held as long as we run
                    netns,
                    [
                        (Target(_socket.IPPROTO_UDP, address, port=PORT), packets),
                        (Target(_socket.IPPROTO_TCP, address, port=PORT), listener),
                    ],
                )
            finally:
                os.close(netns)
        except BaseException:
            for each in made:
                each.close()
            raise
        self.address, self._sender = address, made[-1]
        self._tasks.spawn("packets", self._take_packets(packets))
        self._tasks.spawn("streams", self._take_streams(listener))

    async def next(self) -> tuple[int, _Query]:
        while True:
            while self._waiting:
                query_id = self._waiting.popleft()
                if query_id in self._open:
                    return query_id, self._open[query_id]
            self._arrived.clear()
            await self._arrived.wait()

    def answer(self, query_id: int, message: bytes) -> None:
        query = self._open.pop(query_id, None)
        if query is None:
            return
        if query.client is None:
            query.answered.set(message)
        else:
            self._send(query.client, message)

    def _add(self, query: _Query) -> int:
        """The oldest makes way: it was lost, or who has sent it asks again."""
        if len(self._open) >= QUERIES_MAX:
            _, oldest = self._open.popitem(last=False)
            oldest.answered.set(b"")
        self._count += 1
        self._open[self._count] = query
        self._waiting.append(self._count)
        self._arrived.set()
        return self._count

    async def _take_packets(self, packets: _socket.socket) -> None:
        while True:
            await self._loop.readable(packets.fileno())
            try:
                message, client = packets.recvfrom(MESSAGE_MAX)
            except OSError:
                continue  # it was another one's, or an error of an earlier packet
            self._add(_Query(message, client))

    def _send(self, client: tuple[str, int], message: bytes) -> None:
        """With headers of IP and UDP (RFC 791, RFC 768). The kernel fills in length and checksum of the former; the
        latter's checksum is optional."""
        assert self._sender is not None
        host, port = client
        length = 8 + len(message)
        if length + 20 > MESSAGE_MAX:
            return
        ip = struct.pack(
            "=BBHHHBBH4s4s", 0x45, 0, 0, 0, 0, 64, _socket.IPPROTO_UDP, 0, self.address, _socket.inet_aton(host)
        )
        udp = struct.pack("!HHHH", PORT, port, length, 0)
        try:
            self._sender.sendto(ip + udp + message, (host, 0))
        except OSError as exc:
            log.debug(f"cannot answer {host}: {exc.strerror}")

    async def _take_streams(self, listener: _socket.socket) -> None:
        accept: Any = listener._accept  # type: ignore[attr-defined]
        while True:
            await self._loop.readable(listener.fileno())
            try:
                fd, _ = accept()
            except BlockingIOError:
                continue
            except OSError as exc:
                log.warning(f"cannot accept a query by TCP: {exc.strerror}")
                await self._loop.sleep(_PAUSE_S)
                continue
            stream = _socket.socket(fileno=fd)
            if len(self._streams) >= STREAMS_MAX:
                stream.close()
                continue
            stream.setblocking(False)
            self._streams.spawn(str(fd), self._serve(stream))

    async def _serve(self, stream: _socket.socket) -> None:
        """Queries one after the other (RFC 1035, 4.2.2)."""
        try:
            while head := await self._read(stream, 2):
                message = await self._read(stream, int.from_bytes(head, "big"))
                query = _Query(message)
                query_id = self._add(query)
                await self._loop.wait_any([query.answered], STREAM_LIMIT_S)
                self._open.pop(query_id, None)
                answer = query.answered.result() if query.answered.done else b""
                if not answer or len(answer) > MESSAGE_MAX:
                    return
                await self._write(stream, len(answer).to_bytes(2, "big") + answer)
        except OSError as exc:
            log.debug(f"a query by TCP: {os.strerror(exc.errno or 0)}")
        finally:
            self._loop.forget(stream.fileno())
            stream.close()

    async def _read(self, stream: _socket.socket, size: int) -> bytes:
        """All of it, or nothing at the end. Raises OSError."""
        found = b""
        while len(found) < size:
            try:
                data = stream.recv(size - len(found))
            except BlockingIOError:
                if not await self._loop.readable(stream.fileno(), STREAM_LIMIT_S):
                    raise TimeoutError(errno.ETIMEDOUT, "nothing comes") from None
                continue
            if not data:
                return b""
            found += data
        return found

    async def _write(self, stream: _socket.socket, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[stream.send(view) :]
            except BlockingIOError:
                if not await self._loop.writable(stream.fileno(), STREAM_LIMIT_S):
                    raise TimeoutError(errno.ETIMEDOUT, "nothing is taken") from None


async def take_names(agent: Agent, request: katapod_pb2.TakeNamesRequest) -> katapod_pb2.TakeNamesResponse:
    address = request.address
    if len(address) != 4 or address[0] != 127:
        raise RpcError(
            StatusCode.INVALID_ARGUMENT, f"cannot take queries to {address[:32].hex()}: not a loopback address"
        )
    names = agent.names
    if names.address and names.address != address:
        raise RpcError(
            StatusCode.ALREADY_EXISTS,
            f"queries are taken at {_socket.inet_ntoa(names.address)}, and at one address only",
        )
    if not names.address:
        try:
            names.take(address)
        except (OSError, KeyError) as exc:
            raise RpcError(
                StatusCode.UNAVAILABLE, f"cannot take queries to {_socket.inet_ntoa(address)}: {exc}"
            ) from exc
    return katapod_pb2.TakeNamesResponse()


async def next_query(agent: Agent, request: katapod_pb2.NextQueryRequest) -> katapod_pb2.NextQueryResponse:
    """Blocks."""
    query_id, query = await agent.names.next()
    return katapod_pb2.NextQueryResponse(query_id=query_id, message=query.message, stream=query.client is None)


async def answer_query(agent: Agent, request: katapod_pb2.AnswerQueryRequest) -> katapod_pb2.AnswerQueryResponse:
    agent.names.answer(request.query_id, request.message)
    return katapod_pb2.AnswerQueryResponse()
