"""The parser and server of the management socket's HTTP, on a real unix socket."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from katapod.rpc.http import BODY_MAX, HEAD_MAX, HttpError, Request, Response, parse_head, serve_http


def test_a_request() -> None:
    request, length = parse_head(b"PUT /a%20b?path=%2Fdev%2Fx&e= HTTP/1.1\r\nHost: shim\r\nContent-Length: 3")
    assert (request.method, request.path, request.query) == ("PUT", "/a b", {"path": "/dev/x", "e": ""})
    assert request.headers == {"host": "shim", "content-length": "3"}
    assert length == 3


def test_a_target_with_a_host() -> None:
    assert parse_head(b"GET http://shim/metrics HTTP/1.1")[0].path == "/metrics"


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"", 400),
        (b"GET", 400),
        (b"GET /", 400),
        (b"GET  / HTTP/1.1", 400),
        (b"GET / HTTP/1.1 x", 400),
        (b"G@T / HTTP/1.1", 400),
        (b"GET metrics HTTP/1.1", 400),
        (b"GET /\xff HTTP/1.1", 400),
        (b"GET /%ff HTTP/1.1", 400),
        (b"GET /?a=%ff HTTP/1.1", 400),
        (b"GET /?" + b"a=1&" * 40 + b" HTTP/1.1", 400),
        (b"GET / HTTP/1.1\r\nno colon", 400),
        (b"GET / HTTP/1.1\r\n: x", 400),
        (b"GET / HTTP/1.1\r\nA B: x", 400),
        (b"GET / HTTP/1.1\r\na: b\nc: d", 400),
        (b"GET / HTTP/1.1\r\nContent-Length: -1", 400),
        (b"GET / HTTP/1.1\r\nContent-Length: 1_0", 400),
        (b"GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2", 400),
        (b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked", 411),
        (b"GET / HTTP/1.1\r\nContent-Length: %d" % (BODY_MAX + 1), 413),
        (b"GET /" + b"x" * 9000 + b" HTTP/1.1", 414),
        (b"GET / HTTP/2.0", 505),
        (b"\x16\x03\x01\x02\x00", 400),
    ],
)
def test_what_is_refused(head: bytes, status: int) -> None:
    with pytest.raises(HttpError) as caught:
        parse_head(head)
    assert caught.value.status == status


PIECES = st.sampled_from(
    [b"GET ", b"/", b" HTTP/1.1", b"\r\n", b"a: b", b"Content-Length: ", b"5", b"%", b"?", b"=", b"&", b"\0", b" "]
)


@given(st.one_of(st.binary(max_size=200), st.lists(st.one_of(PIECES, st.binary(max_size=3))).map(b"".join)))
def test_any_bytes_are_a_request_or_an_error(data: bytes) -> None:
    try:
        request, length = parse_head(data)
    except HttpError:
        return
    assert request.path.startswith("/")
    assert 0 <= length <= BODY_MAX


async def echo(request: Request) -> Response:
    if request.path == "/fail":
        raise HttpError(404, "URL NOT FOUND")
    if request.path == "/bug":
        raise ZeroDivisionError("a bug")
    if request.path == "/hang":
        await asyncio.sleep(3600)
    return Response(request.method.encode() + b" " + request.path.encode() + b" " + request.body)


@asynccontextmanager
async def served(tmp_path: Path, read_limit_s: float = 30.0) -> AsyncIterator[str]:
    path = str(tmp_path / "s.sock")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen()
    server = await serve_http(listener, echo, read_limit_s=read_limit_s)
    try:
        yield path
    finally:
        await server.close()


async def ask(path: str, data: bytes) -> tuple[int, bytes]:
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(data)
    answer = await reader.read()
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    if head.startswith(b"HTTP/1.1 100"):
        head, _, body = body.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


async def test_requests_of_many_kinds(tmp_path: Path) -> None:
    async with served(tmp_path) as path:
        assert await ask(path, b"GET /x HTTP/1.1\r\n\r\n") == (200, b"GET /x ")
        assert await ask(path, b"PUT /x HTTP/1.1\r\nContent-Length: 4\r\n\r\nbody") == (200, b"PUT /x body")
        assert await ask(path, b"HEAD /x HTTP/1.1\r\n\r\n") == (200, b"")
        assert await ask(path, b"GET /fail HTTP/1.1\r\n\r\n") == (404, b"URL NOT FOUND")
        assert (await ask(path, b"GET /bug HTTP/1.1\r\n\r\n"))[0] == 500
        assert (await ask(path, b"nonsense\r\n\r\n"))[0] == 400
        assert (await ask(path, b"GET / HTTP/1.1\r\na: " + b"x" * 2 * HEAD_MAX + b"\r\n\r\n"))[0] == 431
        expecting = b"PUT /x HTTP/1.1\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\nbody"
        assert await ask(path, expecting) == (200, b"PUT /x body")


async def test_a_slow_client_gets_no_more_than_its_time(tmp_path: Path) -> None:
    async with served(tmp_path, read_limit_s=0.05) as path:
        assert (await ask(path, b"GET /x HTTP/1.1\r\n"))[0] == 408
        assert (await ask(path, b"PUT /x HTTP/1.1\r\nContent-Length: 9\r\n\r\nbody"))[0] == 408


async def test_clients_that_go_away_do_no_harm(tmp_path: Path) -> None:
    async with served(tmp_path) as path:
        for data in (b"", b"GET /x", b"PUT /x HTTP/1.1\r\nContent-Length: 9\r\n\r\nb", b"GET /x HTTP/1.1\r\n\r\n"):
            _, writer = await asyncio.open_unix_connection(path)
            writer.write(data)
            await writer.drain()
            writer.close()
            await writer.wait_closed()
        assert (await ask(path, b"GET /x HTTP/1.1\r\n\r\n"))[0] == 200


async def test_too_many_clients_are_told_so_and_others_served_afterwards(tmp_path: Path) -> None:
    async with served(tmp_path) as path:
        waiting = [await asyncio.open_unix_connection(path) for _ in range(32)]
        assert (await ask(path, b""))[0] == 503
        for reader, writer in waiting:
            writer.write(b"GET /x HTTP/1.1\r\n\r\n")
            assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
            writer.close()
        assert (await ask(path, b"GET /x HTTP/1.1\r\n\r\n"))[0] == 200


async def test_closing_ends_what_is_under_way(tmp_path: Path) -> None:
    async with served(tmp_path) as path:
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b"GET /hang HTTP/1.1\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0)
    with pytest.raises((ConnectionRefusedError, FileNotFoundError)):  # from Python 3.13 on the socket's file goes
        await asyncio.open_unix_connection(path)
    with contextlib.suppress(ConnectionResetError):
        assert await reader.read() == b""
    writer.close()
