"""HTTP/1.1 over stream sockets, for management sockets and kata-monitor: a server and a GET, everything bounded.

h11 parses and frames what peers send. One request per connection; no chunked request bodies, no keep-alive.
Sources: RFC 9110, RFC 9112.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from urllib.parse import parse_qsl, unquote

import h11

from katapod.tasks import Background

__all__ = [
    "BODY_MAX",
    "HEAD_MAX",
    "HttpError",
    "HttpServer",
    "Request",
    "Response",
    "get_http",
    "parse_head",
    "serve_http",
]

log = logging.getLogger(__name__)

HEAD_MAX = 16 * 1024  # bytes of request line and headers
TARGET_MAX = 8 * 1024
BODY_MAX = 4 * 1024 * 1024  # an iptables file or a policy
CONNECTIONS_MAX = 32
READ_LIMIT_S = 10.0
ANSWER_LIMIT_S = 60.0
WRITE_LIMIT_S = 10.0
BLOCK = 64 * 1024  # bytes asked of a socket at a time
PROBLEM_MAX = 200  # characters of what h11 says is wrong: it quotes the line


class HttpError(Exception):
    """An error response; the text is its body."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str  # decoded; begins with a slash
    query: dict[str, str]  # the first value of each name
    headers: dict[str, str]  # names in lower case
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Response:
    body: bytes = b""
    status: int = 200
    content_type: str = "text/plain; charset=utf-8"
    headers: dict[str, str] = field(default_factory=dict)


Handler = Callable[[Request], Awaitable[Response]]


def parse_head(head: bytes, connection: h11.Connection) -> tuple[Request, int]:
    """(the request without its body, length of the body) from the bytes up to and including the empty line.

    `connection` is new, and can be asked for the body afterwards. Raises HttpError.
    """
    if b"\n" in head.replace(b"\r\n", b""):  # h11 takes a bare LF for the end of a line, as RFC 9112 2.2 allows
        raise HttpError(400, "malformed request: a line does not end in CRLF")
    connection.receive_data(head)
    try:
        event = connection.next_event()
    except h11.RemoteProtocolError as exc:
        raise HttpError(exc.error_status_hint, str(exc)[:PROBLEM_MAX]) from exc
    if not isinstance(event, h11.Request):
        raise HttpError(400, "malformed request")
    if len(event.target) > TARGET_MAX:
        raise HttpError(414, f"the target has more than {TARGET_MAX} bytes")
    if event.http_version not in (b"1.1", b"1.0"):
        raise HttpError(505, "unsupported HTTP version: use HTTP/1.1")
    headers = {name.decode(): value.decode("latin-1") for name, value in event.headers}
    if "transfer-encoding" in headers:
        raise HttpError(411, "a request body needs a Content-Length")
    length = int(headers.get("content-length", 0))
    if length > BODY_MAX:
        raise HttpError(413, f"the body has more than {BODY_MAX} bytes")
    path, query = _split_target(event.target.decode())
    return Request(event.method.decode(), path, query, headers), length


def _split_target(target: str) -> tuple[str, dict[str, str]]:
    """(path, query), decoded. Raises HttpError."""
    if target.startswith("http://"):
        target = "/" + target.removeprefix("http://").partition("/")[2]
    if not target.startswith("/"):
        raise HttpError(400, "malformed target")
    path, _, query = target.partition("?")
    pairs: dict[str, str] = {}
    try:
        for name, value in parse_qsl(query, keep_blank_values=True, max_num_fields=32, errors="strict"):
            pairs.setdefault(name, value)
        return unquote(path, errors="strict"), pairs
    except ValueError as exc:  # too many fields, or not UTF-8
        raise HttpError(400, "malformed target") from exc


class HttpServer:
    """Serves on a listening socket, which it owns, until it is closed."""

    def __init__(self, handler: Handler, read_limit_s: float) -> None:
        self._handler = handler
        self._read_limit_s = read_limit_s
        self._background = Background()
        self._server: asyncio.Server | None = None
        self._closed = False

    async def listen(self, listener: socket.socket) -> None:
        start = asyncio.start_unix_server if listener.family == socket.AF_UNIX else asyncio.start_server
        self._server = await start(self._accept, sock=listener, limit=HEAD_MAX)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._closed:  # accepted while closing
            writer.transport.abort()
            return
        if len(self._background) >= CONNECTIONS_MAX:
            writer.write(_render(h11.Connection(h11.SERVER), _error(503, "too many connections"), head_only=False))
            writer.close()
            return
        self._background.start(self._serve(reader, writer), name="http")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection, head_only = h11.Connection(h11.SERVER, HEAD_MAX), False
        try:
            try:
                async with asyncio.timeout(self._read_limit_s):
                    request = await _read_request(connection, reader, writer)
                head_only = request.method == "HEAD"
                response = await self._answer(request)
            except HttpError as exc:
                response = _error(exc.status, exc.text)
            except TimeoutError:
                response = _error(408, "the request did not arrive in time")
            writer.write(_render(connection, response, head_only=head_only))
            async with asyncio.timeout(WRITE_LIMIT_S):
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (OSError, EOFError, TimeoutError, h11.RemoteProtocolError) as exc:
            log.debug("client dropped: %r", exc)
            writer.transport.abort()
        except asyncio.CancelledError:
            writer.transport.abort()
            raise

    async def _answer(self, request: Request) -> Response:
        try:
            async with asyncio.timeout(ANSWER_LIMIT_S):
                return await self._handler(request)
        except HttpError:
            raise
        except TimeoutError:
            return _error(503, f"no answer within {ANSWER_LIMIT_S:g} s")
        except Exception as exc:
            log.exception("unexpected error in a request")
            return _error(500, repr(exc))

    async def close(self) -> None:
        """Stop serving and drop all connections. Idempotent."""
        self._closed = True
        if self._server is not None:
            self._server.close()
        await self._background.close()


async def serve_http(listener: socket.socket, handler: Handler, *, read_limit_s: float = READ_LIMIT_S) -> HttpServer:
    """Serve on a listening socket; `handler` raises HttpError for an error response."""
    server = HttpServer(handler, read_limit_s)
    await server.listen(listener)
    return server


async def _read_request(
    connection: h11.Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> Request:
    """Raises HttpError, EOFError, h11.RemoteProtocolError if the body breaks off."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError as exc:
        raise HttpError(431, f"request line and headers have more than {HEAD_MAX} bytes") from exc
    request, length = parse_head(head, connection)
    if connection.they_are_waiting_for_100_continue:
        writer.write(connection.send(h11.InformationalResponse(status_code=100, headers=[], reason="Continue")))
    return replace(request, body=await _read_body(connection, reader, length))


async def get_http(path: str, target: str, *, limit_s: float, body_max: int) -> bytes:
    """The body of GET `target` from a server on a unix socket.

    Raises HttpError, with status 502 if the answer is not a whole one; OSError, which includes TimeoutError.
    """
    connection = h11.Connection(h11.CLIENT, HEAD_MAX)
    async with asyncio.timeout(limit_s):
        reader, writer = await asyncio.open_unix_connection(path)
        try:
            headers = [("Host", "shim"), ("Connection", "close")]
            writer.write(connection.send(h11.Request(method="GET", target=target, headers=headers)))
            writer.write(connection.send(h11.EndOfMessage()))
            answer = await _next_event(connection, reader)
            if not isinstance(answer, h11.Response):
                raise HttpError(502, "cannot read the answer: no response")
            body = await _read_body(connection, reader, body_max)
        except h11.RemoteProtocolError as exc:
            raise HttpError(502, f"cannot read the answer: {str(exc)[:PROBLEM_MAX]}") from exc
        finally:
            writer.close()
    if answer.status_code != 200:
        raise HttpError(answer.status_code, body[:2000].decode(errors="replace"))
    return body


async def _read_body(connection: h11.Connection, reader: asyncio.StreamReader, body_max: int) -> bytes:
    """Up to the end of the message. Raises HttpError, h11.RemoteProtocolError."""
    body = bytearray()
    while isinstance(event := await _next_event(connection, reader), h11.Data):
        body += event.data
        if len(body) > body_max:
            raise HttpError(502, f"the answer has more than {body_max} bytes")
    return bytes(body)


async def _next_event(
    connection: h11.Connection, reader: asyncio.StreamReader
) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
    """The next event that the peer sends. Raises h11.RemoteProtocolError, also at a premature end."""
    while (event := connection.next_event()) is h11.NEED_DATA:
        connection.receive_data(await reader.read(BLOCK))
    return event


def _error(status: int, text: str) -> Response:
    return Response(text.encode(errors="replace"), status)


def _render(connection: h11.Connection, response: Response, *, head_only: bool) -> bytes:
    headers = [
        ("Content-Type", response.content_type),
        ("Content-Length", str(len(response.body))),
        *response.headers.items(),
        ("Connection", "close"),
    ]
    reason = HTTPStatus(response.status).phrase
    head = connection.send(h11.Response(status_code=response.status, reason=reason, headers=headers))
    return head if head_only else head + response.body
