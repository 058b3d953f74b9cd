"""HTTP of the management socket and of kata-monitor: parser, server and client, on real unix sockets."""

import asyncio
import contextlib
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from katapod.rpc.http import BODY_MAX, HEAD_MAX, HttpError, Request, Response, get_http, parse_head, serve_http

GET = b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n"


def parsed(head: bytes) -> tuple[Request, int]:
    return parse_head(head + b"\r\n\r\n", h11.Connection(h11.SERVER))


def test_a_request() -> None:
    request, length = parsed(b"PUT /a%20b?path=%2Fdev%2Fx&e= HTTP/1.1\r\nHost: shim\r\nContent-Length: 3")
    assert (request.method, request.path, request.query) == ("PUT", "/a b", {"path": "/dev/x", "e": ""})
    assert request.headers == {"host": "shim", "content-length": "3"}
    assert length == 3


def test_a_target_with_a_host() -> None:
    assert parsed(b"GET http://shim/metrics HTTP/1.1\r\nHost: shim")[0].path == "/metrics"


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"", 400),
        (b"GET", 400),
        (b"GET /", 400),
        (b"GET  / HTTP/1.1\r\nHost: x", 400),
        (b"GET / HTTP/1.1 x\r\nHost: x", 400),
        (b"G@T / HTTP/1.1\r\nHost: x", 400),
        (b"GET metrics HTTP/1.1\r\nHost: x", 400),
        (b"GET /\xff HTTP/1.1\r\nHost: x", 400),
        (b"GET /%ff HTTP/1.1\r\nHost: x", 400),
        (b"GET /?a=%ff HTTP/1.1\r\nHost: x", 400),
        (b"GET /?" + b"a=1&" * 40 + b" HTTP/1.1\r\nHost: x", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nno colon", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\n: x", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA B: x", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\na: b\nc: d", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1_0", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked", 411),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: %d" % (BODY_MAX + 1), 413),
        (b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nHost: x", 414),
        (b"GET / HTTP/1.1", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nHost: y", 400),
        (b"GET / HTTP/1.1\nHost: x", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked", 411),
        (b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip", 501),
        (b"GET / HTTP/2.0\r\nHost: x", 505),
        (b"\x16\x03\x01\x02\x00", 400),
    ],
)
def test_what_is_refused(head: bytes, status: int) -> None:
    """Each for its own fault: every one that has a whole request line has a host."""
    with pytest.raises(HttpError) as caught:
        parsed(head)
    assert caught.value.status == status


PIECES = st.sampled_from(
    [b"GET ", b"/", b" HTTP/1.1", b"\r\n", b"a: b", b"Content-Length: ", b"5", b"%", b"?", b"=", b"&", b"\0", b" "]
)


@given(st.one_of(st.binary(max_size=200), st.lists(st.one_of(PIECES, st.binary(max_size=3))).map(b"".join)))
def test_any_bytes_are_a_request_or_an_error(data: bytes) -> None:
    try:
        request, length = parsed(data)
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
        assert await ask(path, GET) == (200, b"GET /x ")
        assert await ask(path, b"PUT /x HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody") == (200, b"PUT /x body")
        assert await ask(path, b"HEAD /x HTTP/1.1\r\nHost: x\r\n\r\n") == (200, b"")
        assert await ask(path, b"GET /fail HTTP/1.1\r\nHost: x\r\n\r\n") == (404, b"URL NOT FOUND")
        assert (await ask(path, b"GET /bug HTTP/1.1\r\nHost: x\r\n\r\n"))[0] == 500
        assert (await ask(path, b"nonsense\r\n\r\n"))[0] == 400
        assert (await ask(path, b"GET / HTTP/1.1\r\nHost: x\r\na: " + b"x" * 2 * HEAD_MAX + b"\r\n\r\n"))[0] == 431
        expecting = b"PUT /x HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\nbody"
        assert await ask(path, expecting) == (200, b"PUT /x body")


async def test_a_slow_client_gets_no_more_than_its_time(tmp_path: Path) -> None:
    async with served(tmp_path, read_limit_s=0.05) as path:
        assert (await ask(path, b"GET /x HTTP/1.1\r\nHost: x\r\n"))[0] == 408
        assert (await ask(path, b"PUT /x HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nbody"))[0] == 408


async def test_clients_that_go_away_do_no_harm(tmp_path: Path) -> None:
    async with served(tmp_path) as path:
        for data in (b"", b"GET /x", b"PUT /x HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nb", GET):
            _, writer = await asyncio.open_unix_connection(path)
            writer.write(data)
            await writer.drain()
            writer.close()
            await writer.wait_closed()
        assert (await ask(path, GET))[0] == 200


async def test_too_many_clients_are_told_so_and_others_served_afterwards(tmp_path: Path) -> None:
    async with served(tmp_path) as path:
        waiting = [await asyncio.open_unix_connection(path) for _ in range(32)]
        assert (await ask(path, b""))[0] == 503
        for reader, writer in waiting:
            writer.write(GET)
            assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
            writer.close()
        assert (await ask(path, GET))[0] == 200


async def test_closing_ends_what_is_under_way(tmp_path: Path) -> None:
    async with served(tmp_path) as path:
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b"GET /hang HTTP/1.1\r\nHost: x\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0)
    with pytest.raises((ConnectionRefusedError, FileNotFoundError)):  # from Python 3.13 on the socket's file goes
        await asyncio.open_unix_connection(path)
    with contextlib.suppress(ConnectionResetError):
        assert await reader.read() == b""
    writer.close()


@asynccontextmanager
async def answering(tmp_path: Path, answer: bytes) -> AsyncIterator[str]:
    """A server that says `answer` to whatever it is asked, and closes."""

    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    path = str(tmp_path / "a.sock")
    async with await asyncio.start_unix_server(say, path):
        yield path


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (b"", 502),
        (b"nonsense\r\n\r\n", 502),
        (b"HTTP/1.1 200 OK\r\nContent-Le", 502),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nbody", 502),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n" + b"x" * 99, 502),
        (b"HTTP/1.1 200 OK\r\na: " + b"x" * 9 * HEAD_MAX, 502),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\nbody", 404),
    ],
)
async def test_the_client_takes_only_whole_answers(tmp_path: Path, answer: bytes, status: int) -> None:
    async with answering(tmp_path, answer) as path:
        with pytest.raises(HttpError) as caught:
            await get_http(path, "/x", limit_s=60, body_max=64)
        assert caught.value.status == status


async def test_the_client_and_the_server(tmp_path: Path) -> None:
    async with served(tmp_path) as path:
        assert await get_http(path, "/x", limit_s=60, body_max=64) == b"GET /x "
        with pytest.raises(TimeoutError):
            await get_http(path, "/hang", limit_s=0.05, body_max=64)


def test_a_sandbox_starts_without_loading_http() -> None:
    code = "import sys, katapod.shim.serve, katapod.sandbox.runner; print('h11' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "False\n"
