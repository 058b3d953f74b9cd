"""A ttrpc server on a Stream: many calls in flight, responses in any order, all sizes bounded.

A table maps `service/method` to handlers; messages are parsed by the classes of the .proto files. Errors become ttrpc
status codes here and nowhere else.
"""

from __future__ import annotations

from katapod.agent import log, trace
from katapod.agent.loop import Cancelled, Future, Loop, Tasks
from katapod.rpc.framing import DATA_SIZE_MAX, Frame, FrameDecoder, FrameError, encode_response, parse_request
from katapod.rpc.pb import agent_pb2, health_pb2, katapod_pb2
from katapod.rpc.status import RpcError, StatusCode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

    from katapod.agent.channel import Stream

    Handler = Callable[[Any], Coroutine[Any, None, Any]]

__all__ = ["CALLS_MAX", "Server", "status_of"]

CALLS_MAX = 4096  # in flight on one connection: each process of a container holds three, for its exit and its streams
REQUEST_BYTES_MAX = 4 * DATA_SIZE_MAX  # total of all requests in flight
ANSWER_BYTES_MAX = 2 * DATA_SIZE_MAX  # further responses wait while more than this is unsent

_SERVICES = {
    "grpc.AgentService": (agent_pb2, "AgentService"),
    "grpc.Health": (health_pb2, "Health"),
    "katapod.Guest": (katapod_pb2, "Guest"),
}


def _service(name: str) -> tuple[Any, str]:
    """The module of a service's messages, and its name there; (None, "") if there is no such service."""
    if name == "katapod.Inspection":  # rarely needed: its messages are loaded here
        from katapod.rpc.pb import inspection_pb2

        return inspection_pb2, "Inspection"
    return _SERVICES.get(name, (None, ""))


def status_of(error: Exception, method: str) -> tuple[int, str]:
    """The ttrpc status for an exception of a handler."""
    if isinstance(error, RpcError):
        return error.code, error.message
    if isinstance(error, OSError):
        cause = error.strerror or str(error)
        where = f" {error.filename}" if error.filename else ""
        return StatusCode.INTERNAL, f"{method} failed:{where} {cause}" if where else f"{method} failed: {cause}"
    return StatusCode.INTERNAL, f"{method} failed: {error!r}"


class Server:
    """Answers calls by `find(method)`, which returns the handler of a method."""

    def __init__(self, loop: Loop, find: Callable[[str, str], Handler | None]) -> None:
        self._loop = loop
        self._find = find
        self._classes: dict[tuple[str, str], Any] = {}
        self.first_answer = Future()
        self.reset_ids = False  # set for a port: an id that is not greater means a new host
        self._early: tuple[FrameDecoder, _Connection] | None = None  # of a host that the port has yet to tell of

    async def serve(self, stream: Stream) -> bool:
        """Serve until the host disconnects (True) or sends something other than ttrpc (False)."""
        decoder, call = self._early or (FrameDecoder(), _Connection(self, stream))
        self._early, call.early = None, False
        try:
            while True:
                data = await stream.read()
                if not data:
                    if call.early:  # this is the end of the host before it
                        self._early = decoder, call
                    return True
                for frame in decoder.feed(data):
                    if self.reset_ids and frame.stream_id <= call.last_id:
                        # A client's ids always increase, so this is a new client: the change of hosts was
                        # too quick for the port to show it.
                        call.tasks.cancel()
                        call = _Connection(self, stream)
                    if self.reset_ids and (call.early or not call.last_id):
                        call.early = stream.host_is_gone()
                    call.begin(frame)
                await self._loop.turn()
        except FrameError as exc:
            log.warning(f"the host's connection is reset: {exc}")
            return False
        except OSError as exc:
            log.debug(f"the host's connection broke: {exc}")
            return True
        finally:
            if self._early is None:
                call.tasks.cancel()

    def request_class(self, service: str, method: str) -> Any:
        """The class of the method's request. Raises RpcError (UNIMPLEMENTED)."""
        known = self._classes.get((service, method))
        if known is None:
            module, name = _service(service)
            if module is None:
                raise RpcError(StatusCode.UNIMPLEMENTED, f"service {service[:200]}")
            descriptor = module.DESCRIPTOR.services_by_name[name].methods_by_name.get(method)
            if descriptor is None:
                raise RpcError(StatusCode.UNIMPLEMENTED, f"method {method[:200]}")
            known = self._classes[service, method] = getattr(module, descriptor.input_type.name)
        return known

    async def answer(self, service: str, method: str, payload: bytes) -> bytes:
        """Run one call. Raises RpcError and whatever the handler raises."""
        request_class = self.request_class(service, method)
        handler = self._find(service, method)
        if handler is None:
            raise RpcError(StatusCode.UNIMPLEMENTED, f"method {method}")
        try:
            request = request_class.FromString(payload)
        except Exception as exc:  # protobuf's DecodeError; naming it would import another module
            raise RpcError(StatusCode.INVALID_ARGUMENT, f"cannot parse the request of {method}: {exc}") from exc
        result = await handler(request)
        return b"" if result is None else result.SerializeToString()


class _Connection:
    """The calls of one host."""

    def __init__(self, server: Server, stream: Stream) -> None:
        self._server = server
        self._stream = stream
        self._loop = server._loop
        self._request_bytes = 0
        self.last_id = 0
        self.early = False  # the port says that there is no host, though this one has sent something
        self.tasks = Tasks(server._loop, "rpc")

    def begin(self, frame: Frame) -> None:
        self.last_id = frame.stream_id
        size = len(frame.data)
        refusal = ""
        if len(self.tasks) >= CALLS_MAX:
            refusal = f"more than {CALLS_MAX} calls are in flight"
        elif self._request_bytes and self._request_bytes + size > REQUEST_BYTES_MAX:
            refusal = f"the calls in flight hold more than {REQUEST_BYTES_MAX} bytes"
        if refusal and len(self.tasks) >= 2 * CALLS_MAX:
            return  # a host that does not read refusals gets no more of them
        if refusal:
            frame.data = b""
            self.tasks.spawn("refusal", self._refuse(frame.stream_id, refusal))
        else:
            self._request_bytes += size
            self.tasks.spawn(f"call-{frame.stream_id}", self._run(frame, size))

    async def _refuse(self, stream_id: int, reason: str) -> None:
        await self._send(encode_response(stream_id, code=StatusCode.RESOURCE_EXHAUSTED, message=reason))

    async def _run(self, frame: Frame, size: int) -> None:
        stream_id, method = frame.stream_id, "the call"
        try:
            while self._stream.unsent_bytes > ANSWER_BYTES_MAX:
                await self._loop.sleep(0.01)
            request = parse_request(frame)
            frame.data = b""
            method = request.method
            with trace.Span(method):
                answer = await self._server.answer(request.service, method, request.payload)
            response = encode_response(stream_id, answer)
        except Cancelled:
            raise
        except Exception as exc:
            code, message = status_of(exc, method)
            if not isinstance(exc, RpcError):
                log.warning(f"{method}: {exc!r}")
            response = encode_response(stream_id, code=code, message=message)
        finally:
            self._request_bytes -= size
        await self._send(response)

    async def _send(self, response: bytes) -> None:
        try:
            await self._stream.write(response)
            self._server.first_answer.set()
        except OSError as exc:
            log.debug(f"cannot answer: {exc}")  # the reader sees the broken connection and closes it
