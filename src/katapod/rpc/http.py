"""HTTP/1.1 for management sockets and kata-monitor. One request a connection, everything bounded; parsing is apart.

Not a web server: no pipelining, no chunked bodies, no keep-alive, one host. Source: RFC 9110 and 9112.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from urllib.parse import parse_qsl, unquote

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

REASONS = {
    200: "OK",
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    411: "Length Required",
    413: "Content Too Large",
    414: "URI Too Long",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
    505: "HTTP Version Not Supported",
}
_TOKEN = frozenset("!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")


class HttpError(Exception):
    """An answer that is no success; the text is its body."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str  # decoded, begins with a slash
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


def parse_head(data: bytes) -> tuple[Request, int]:
    """(the request without its body, length of the body) from the bytes before the empty line. Raises HttpError."""
    lines = data.decode("latin-1").split("\r\n")
    method, target = _request_line(lines[0])
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if not colon or not name or not _TOKEN.issuperset(name) or "\n" in value or "\r" in value or "\0" in value:
            raise HttpError(400, "malformed header")
        key, value = name.lower(), value.strip(" \t")
        if headers.get(key, value) != value and key == "content-length":
            raise HttpError(400, "two lengths of the body")
        headers[key] = value
    if "transfer-encoding" in headers:
        raise HttpError(411, "the length of the body has to be given: Content-Length")
    path, _, query = target.partition("?")
    pairs: dict[str, str] = {}
    try:
        for name, value in parse_qsl(query, keep_blank_values=True, max_num_fields=32, errors="strict"):
            pairs.setdefault(name, value)
        path = unquote(path, errors="strict")
    except ValueError as exc:  # too many, or no UTF-8
        raise HttpError(400, "malformed target") from exc
    return Request(method, path, pairs, headers), _body_length(headers)


def _request_line(line: str) -> tuple[str, str]:
    parts = line.split(" ")
    if len(parts) != 3:
        raise HttpError(400, "malformed request line")
    method, target, version = parts
    if len(target) > TARGET_MAX:
        raise HttpError(414, f"the target has more than {TARGET_MAX} bytes")
    if not method or not _TOKEN.issuperset(method) or not target.isascii() or not target.isprintable():
        raise HttpError(400, "malformed request line")
    if not version.startswith("HTTP/"):
        raise HttpError(400, "malformed request line")
    if version not in ("HTTP/1.1", "HTTP/1.0"):
        raise HttpError(505, "HTTP/1.1 is spoken here")
    if target.startswith("http://"):
        target = "/" + target.removeprefix("http://").partition("/")[2]
    if not target.startswith("/"):
        raise HttpError(400, "malformed target")
    return method, target


def _body_length(headers: dict[str, str]) -> int:
    text = headers.get("content-length", "0")
    if not (text.isascii() and text.isdigit() and len(text) <= 19):
        raise HttpError(400, "malformed Content-Length")
    if int(text) > BODY_MAX:
        raise HttpError(413, f"the body has more than {BODY_MAX} bytes")
    return int(text)


class HttpServer:
    """Answers on a listening socket, which it owns, until it is closed."""

    def __init__(self, handler: Handler, read_limit_s: float) -> None:
        self._handler = handler
        self._read_limit_s = read_limit_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._closed = False

    async def listen(self, listener: socket.socket) -> None:
        start = asyncio.start_unix_server if listener.family == socket.AF_UNIX else asyncio.start_server
        self._server = await start(self._accept, sock=listener, limit=HEAD_MAX)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._closed:  # it was on its way
            writer.transport.abort()
            return
        if len(self._tasks) >= CONNECTIONS_MAX:
            writer.write(_render(_error(503, "too many connections"), head_only=False))
            writer.close()
            return
        task = asyncio.create_task(self._serve(reader, writer), name="http")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head_only = False
            try:
                async with asyncio.timeout(self._read_limit_s):
                    request = await _read_request(reader, writer)
                head_only = request.method == "HEAD"
                response = await self._answer(request)
            except HttpError as exc:
                response = _error(exc.status, exc.text)
            except TimeoutError:
                response = _error(408, "the request did not come in time")
            writer.write(_render(response, head_only=head_only))
            async with asyncio.timeout(WRITE_LIMIT_S):
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (OSError, EOFError, TimeoutError) as exc:
            log.debug("a client is dropped: %r", exc)
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
            log.exception("a request failed for a reason we did not foresee")
            return _error(500, repr(exc))

    async def close(self) -> None:
        """Answer nobody any more, whoever is connected. Idempotent."""
        self._closed = True
        if self._server is not None:
            self._server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


async def serve_http(listener: socket.socket, handler: Handler, *, read_limit_s: float = READ_LIMIT_S) -> HttpServer:
    """Serve on a listening socket; `handler` raises HttpError for what is no success."""
    server = HttpServer(handler, read_limit_s)
    await server.listen(listener)
    return server


async def _read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request:
    """Raises HttpError, EOFError."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError as exc:
        raise HttpError(431, f"request line and headers have more than {HEAD_MAX} bytes") from exc
    request, length = parse_head(head[:-4])
    if length and request.headers.get("expect", "").lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    return replace(request, body=await reader.readexactly(length))


async def get_http(path: str, target: str, *, limit_s: float, body_max: int) -> bytes:
    """GET `target` from who serves on a unix socket as we do. Raises HttpError, OSError (a TimeoutError too)."""
    async with asyncio.timeout(limit_s):
        reader, writer = await asyncio.open_unix_connection(path)
        try:
            writer.write(f"GET {target} HTTP/1.1\r\nHost: shim\r\n\r\n".encode())
            answer = bytearray()
            while chunk := await reader.read(65536):
                answer += chunk
                if len(answer) > HEAD_MAX + body_max:
                    raise HttpError(502, f"the answer has more than {body_max} bytes")
        finally:
            writer.close()
    head, _, body = bytes(answer).partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    if len(words) < 3 or not words[1].isdigit():
        raise HttpError(502, "the answer was cut off" if not head else "what answers there speaks no HTTP")
    if int(words[1]) != 200:
        raise HttpError(int(words[1]), body[:2000].decode(errors="replace"))
    return body


def _error(status: int, text: str) -> Response:
    return Response(text.encode(errors="replace"), status)


def _render(response: Response, *, head_only: bool) -> bytes:
    lines = [
        f"HTTP/1.1 {response.status} {REASONS.get(response.status, 'Unknown')}",
        f"Content-Type: {response.content_type}",
        f"Content-Length: {len(response.body)}",
        *(f"{name}: {value}" for name, value in response.headers.items()),
        "Connection: close",
    ]
    head = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
    return head if head_only else head + response.body
