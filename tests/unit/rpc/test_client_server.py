"""The ttrpc client against the ttrpc server over a real unix socket, and against peers that misbehave."""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from katapod.rpc.client import TtrpcClient
from katapod.rpc.framing import DATA_SIZE_MAX, FrameDecoder, encode_frame, encode_response, parse_request
from katapod.rpc.pb import health_pb2
from katapod.rpc.server import CALLS_PER_CONNECTION_MAX, Handler, serve_ttrpc
from katapod.rpc.status import RpcError, StatusCode
from kit.loop_time import LIMIT_S, LoopClock, until


@pytest.fixture
async def complaints() -> AsyncIterator[list[str]]:
    """What asyncio complains about to its last resort: exceptions that nobody has seen."""
    found: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: found.append(str(context)))
    yield found
    import gc

    gc.collect()
    assert found == []


@contextlib.asynccontextmanager
async def served(directory: Path, handler: Handler) -> AsyncIterator[TtrpcClient]:
    path = str(directory / "s")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(8)
    server = await serve_ttrpc(listener, handler)
    client = await TtrpcClient.on_unix_path(path, "the peer")
    try:
        yield client
    finally:
        client.close()
        server.close()
        await server.wait_closed()
        await asyncio.sleep(0)


async def echo(service: str, method: str, payload: bytes) -> bytes:
    return f"{service}/{method}:".encode() + payload


async def test_a_call(tmp_path: Path, complaints: list[str]) -> None:
    async with served(tmp_path, echo) as client:
        assert await client.call_raw("s", "m", b"x", LIMIT_S) == b"s/m:x"


async def test_answers_come_in_any_order(tmp_path: Path, complaints: list[str]) -> None:
    gates = [asyncio.Event() for _ in range(20)]

    async def handler(service: str, method: str, payload: bytes) -> bytes:
        await gates[int(payload)].wait()
        return payload

    async with served(tmp_path, handler) as client:
        calls = [asyncio.create_task(client.call_raw("s", "m", b"%d" % number, LIMIT_S)) for number in range(20)]
        for number in reversed(range(20)):
            gates[number].set()
            assert await calls[number] == b"%d" % number


async def test_large_payloads_pass_both_ways(tmp_path: Path, complaints: list[str]) -> None:
    async with served(tmp_path, echo) as client:
        payload = bytes(DATA_SIZE_MAX - 100)
        answers = await asyncio.gather(*(client.call_raw("s", "m", payload, LIMIT_S) for _ in range(4)))
    assert {len(answer) for answer in answers} == {len(payload) + 4}


async def test_statuses_of_the_handler_arrive(tmp_path: Path, complaints: list[str]) -> None:
    async def handler(service: str, method: str, payload: bytes) -> bytes:
        if method == "big":
            return bytes(DATA_SIZE_MAX + 1)
        if method == "bug":
            raise KeyError("surprise")
        if method == "odd":
            raise RpcError(StatusCode.NOT_FOUND, "no file \udce9")
        raise RpcError(StatusCode.UNIMPLEMENTED, f"service {service}")

    async with served(tmp_path, handler) as client:
        for method, code in (
            ("none", StatusCode.UNIMPLEMENTED),
            ("big", StatusCode.RESOURCE_EXHAUSTED),
            ("bug", StatusCode.INTERNAL),
            ("odd", StatusCode.NOT_FOUND),
        ):
            with pytest.raises(RpcError) as caught:
                await client.call_raw("nobody", method, b"", LIMIT_S)
            assert caught.value.code is code, method


async def test_a_call_has_a_time_limit_and_its_late_answer_harms_nobody(tmp_path: Path, complaints: list[str]) -> None:
    gate = asyncio.Event()

    async def handler(service: str, method: str, payload: bytes) -> bytes:
        if method == "slow":
            await gate.wait()
        return payload

    async with served(tmp_path, handler) as client:
        with pytest.raises(RpcError, match=r"the peer: slow was not answered within 0\.05 s") as caught:
            await client.call_raw("s", "slow", b"late", 0.05)
        assert caught.value.code is StatusCode.DEADLINE_EXCEEDED
        gate.set()
        assert await client.call_raw("s", "quick", b"mine", LIMIT_S) == b"mine"


async def test_an_answer_that_has_come_counts_although_we_were_too_busy_to_see_it(complaints: list[str]) -> None:
    busy, answered = threading.Event(), threading.Event()

    def peer(sock: socket.socket) -> None:
        number = read_request(sock, FrameDecoder())
        busy.wait(60)
        sock.sendall(encode_response(number, b"in time"))
        answered.set()

    async with against(peer) as client:
        clock = LoopClock()
        call = asyncio.create_task(client.call_raw("s", "m", b"", 1000))
        await until(lambda: client._waiting)  # it is sent
        busy.set()
        assert answered.wait(60)  # and nothing else is done meanwhile
        clock.pass_time(1000)  # the loop finds the answer and the end of the time at once
        assert await call == b"in time"


async def test_too_many_calls_at_once_are_refused_not_queued(tmp_path: Path, complaints: list[str]) -> None:
    gate = asyncio.Event()

    async def handler(service: str, method: str, payload: bytes) -> bytes:
        await gate.wait()
        return payload

    async with served(tmp_path, handler) as client:
        calls = [asyncio.create_task(client.call_raw("s", "m", b"", LIMIT_S)) for _ in range(CALLS_PER_CONNECTION_MAX)]
        await until(lambda: len(client._waiting) == CALLS_PER_CONNECTION_MAX)  # all are sent
        with pytest.raises(RpcError, match="calls are in flight"):
            await client.call_raw("s", "m", b"", LIMIT_S)
        gate.set()
        assert await asyncio.gather(*calls) == [b""] * CALLS_PER_CONNECTION_MAX


async def test_a_client_that_goes_away_cancels_its_calls(tmp_path: Path, complaints: list[str]) -> None:
    begun, cancelled = asyncio.Event(), asyncio.Event()

    async def handler(service: str, method: str, payload: bytes) -> bytes:
        begun.set()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return b""

    async with served(tmp_path, handler) as client:
        call = asyncio.create_task(client.call_raw("s", "m", b"", LIMIT_S))
        await begun.wait()
        client.close()
        with pytest.raises(RpcError, match="the connection was closed"):
            await call
        async with asyncio.timeout(60):
            await cancelled.wait()


@contextlib.asynccontextmanager
async def against(peer: Callable[[socket.socket], Any]) -> AsyncIterator[TtrpcClient]:
    """A client whose other end is `peer`, run in a thread with a blocking socket."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(60)
    client = await TtrpcClient.on_socket(ours, "the guest")
    work = asyncio.create_task(asyncio.to_thread(peer, theirs))
    try:
        yield client
    finally:
        client.close()
        await asyncio.sleep(0)
        with contextlib.suppress(OSError):
            await work
        theirs.close()


def read_request(sock: socket.socket, decoder: FrameDecoder) -> int:
    while True:
        frames = decoder.feed(sock.recv(65536))
        if frames:
            parse_request(frames[0])
            return frames[0].stream_id


async def test_a_broken_link_fails_every_waiter_and_later_calls(complaints: list[str]) -> None:
    def peer(sock: socket.socket) -> None:
        seen, decoder = 0, FrameDecoder()
        while seen < 5:  # all of them: to a peer that is gone already, the next write would fail in other words
            seen += len(decoder.feed(sock.recv(65536)))
        sock.shutdown(socket.SHUT_RDWR)

    async with against(peer) as client:
        calls = [asyncio.create_task(client.call_raw("s", "m", b"", None)) for _ in range(5)]
        async with asyncio.timeout(60):
            results = await asyncio.gather(*calls, return_exceptions=True)
        assert {result.code for result in results if isinstance(result, RpcError)} == {StatusCode.UNAVAILABLE}
        assert all(isinstance(result, RpcError) for result in results)
        with pytest.raises(RpcError, match="the guest: cannot call m: the connection was closed by the peer"):
            await client.call_raw("s", "m", b"", LIMIT_S)


async def test_a_call_that_cannot_even_be_sent_fails_with_the_link(complaints: list[str]) -> None:
    """The peer reads nothing: the call waits for room, and must not leave an unseen exception behind."""
    ours, theirs = socket.socketpair()
    client = await TtrpcClient.on_socket(ours, "the guest")
    calls = [asyncio.create_task(client.call_raw("s", "m", bytes(1 << 20), None)) for _ in range(4)]
    await asyncio.sleep(0.05)
    theirs.close()
    async with asyncio.timeout(60):
        results = await asyncio.gather(*calls, return_exceptions=True)
    assert [getattr(result, "code", None) for result in results] == [StatusCode.UNAVAILABLE] * 4
    client.close()
    del results, calls
    await asyncio.sleep(0)


async def test_a_peer_that_speaks_no_ttrpc_is_dropped(complaints: list[str]) -> None:
    async with against(lambda sock: sock.sendall(b"login: \r\n" * 10)) as client:
        with pytest.raises(RpcError, match=r"cannot read frame: unknown type|cannot call"):
            await client.call_raw("s", "m", b"", LIMIT_S)
        assert client.closed.done()


async def test_answers_to_nobody_are_ignored(complaints: list[str]) -> None:
    def peer(sock: socket.socket) -> None:
        number = read_request(sock, FrameDecoder())
        sock.sendall(encode_response(number + 2, b"not asked"))
        sock.sendall(encode_frame(number, 3, b"stream data"))
        sock.sendall(encode_response(number, b"asked"))
        sock.sendall(encode_response(number, b"twice"))

    async with against(peer) as client:
        assert await client.call_raw("s", "m", b"", LIMIT_S) == b"asked"


async def test_an_oversized_answer_fails_its_call_only(complaints: list[str]) -> None:
    def peer(sock: socket.socket) -> None:
        decoder = FrameDecoder()
        number = read_request(sock, decoder)
        sock.sendall(struct.pack(">IIBB", DATA_SIZE_MAX + 5, number, 2, 0) + bytes(DATA_SIZE_MAX + 5))
        sock.sendall(encode_response(read_request(sock, decoder), b"fine"))

    async with against(peer) as client:
        with pytest.raises(RpcError, match="larger than"):
            await client.call_raw("s", "m", b"", LIMIT_S)
        assert await client.call_raw("s", "m", b"", LIMIT_S) == b"fine"


async def test_an_answer_of_another_shape(complaints: list[str]) -> None:
    def peer(sock: socket.socket) -> None:
        sock.sendall(encode_response(read_request(sock, FrameDecoder()), b"\xff\xff\xff"))

    async with against(peer) as client:
        with pytest.raises(RpcError, match="the guest: cannot parse the answer to Check") as caught:
            await client.call(
                "grpc.Health", "Check", health_pb2.CheckRequest(), health_pb2.HealthCheckResponse, LIMIT_S
            )
        assert caught.value.code is StatusCode.INTERNAL


async def test_a_request_too_large_fails_before_it_is_sent(tmp_path: Path, complaints: list[str]) -> None:
    async with served(tmp_path, echo) as client:
        with pytest.raises(RpcError) as caught:
            await client.call_raw("s", "m", bytes(DATA_SIZE_MAX + 1), LIMIT_S)
        assert caught.value.code is StatusCode.RESOURCE_EXHAUSTED
        assert await client.call_raw("s", "m", b"", LIMIT_S) == b"s/m:"


async def test_ids_grow_in_the_order_in_which_they_are_sent(complaints: list[str]) -> None:
    """Also where calls wait for a peer that reads slowly: an agent on a serial port tells hosts apart by that."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    client = await TtrpcClient.on_socket(ours, "the peer")

    async def caller() -> None:
        for _ in range(20):  # whoever has got an answer goes on in the moment in which others may write again
            await client.call_raw("s", "m", bytes(30_000), LIMIT_S)

    callers = [asyncio.create_task(caller()) for _ in range(20)]
    loop, decoder = asyncio.get_running_loop(), FrameDecoder()
    ids: list[int] = []
    while len(ids) < 20 * len(callers):
        for frame in decoder.feed(await loop.sock_recv(theirs, 65536)):
            ids.append(frame.stream_id)
            await loop.sock_sendall(theirs, encode_response(frame.stream_id, b""))
    await asyncio.gather(*callers)
    assert ids == sorted(ids)
    client.close()
    theirs.close()


async def test_a_server_waits_for_the_end_of_its_calls(tmp_path: Path, complaints: list[str]) -> None:
    begun, ended = 0, list[str]()

    async def handler(service: str, method: str, payload: bytes) -> bytes:
        nonlocal begun
        begun += 1
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0.01)
            ended.append(method)
        return b""

    async with served(tmp_path, handler) as client:
        calls = [asyncio.create_task(client.call_raw("s", f"m{number}", b"", None)) for number in range(3)]
        await until(lambda: begun == 3)
    assert sorted(ended) == ["m0", "m1", "m2"]
    for call in calls:
        with pytest.raises(RpcError):
            await call
