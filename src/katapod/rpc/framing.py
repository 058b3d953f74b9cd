"""ttrpc frames, without I/O: bytes in, frames out.

A frame is a header of 10 bytes (data length, stream id, type, flags; big endian) and its data.
Source: PROTOCOL.md of containerd/ttrpc. The agent imports this module: keep imports to a minimum.
"""

import struct

from katapod.rpc.pb import ttrpc_pb2
from katapod.rpc.status import RpcError, StatusCode

__all__ = [
    "DATA_SIZE_MAX",
    "REQUEST",
    "RESPONSE",
    "Frame",
    "FrameDecoder",
    "FrameError",
    "encode_frame",
    "encode_request",
    "encode_response",
    "parse_request",
    "parse_response",
]

DATA_SIZE_MAX = 4 * 1024 * 1024  # bytes of data in one frame, ttrpc's own limit
MESSAGE_MAX = 4096  # characters of a status message, which ends up in logs and on terminals
HEADER = struct.Struct(">IIBB")
REQUEST, RESPONSE, DATA = 1, 2, 3


class FrameError(Exception):
    """The peer does not speak ttrpc. The connection is unusable."""


class Frame:
    """One frame. `oversized` frames were skipped: their data is empty and must be answered with an error."""

    __slots__ = ("data", "flags", "kind", "oversized", "stream_id")

    def __init__(self, stream_id: int, kind: int, flags: int, data: bytes, *, oversized: bool = False) -> None:
        self.stream_id = stream_id
        self.kind = kind
        self.flags = flags
        self.data = data
        self.oversized = oversized


class FrameDecoder:
    """Splits a byte stream into frames; holds at most one frame's data and the bytes fed last."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._skip = 0  # bytes of an oversized frame still to be skipped

    def feed(self, data: bytes) -> list[Frame]:
        """Return the frames completed by `data`. Raises FrameError on a frame type that does not exist."""
        frames: list[Frame] = []
        buffer = self._buffer
        buffer += data
        position = 0
        while True:
            if self._skip:
                dropped = min(self._skip, len(buffer) - position)
                self._skip -= dropped
                position += dropped
            if self._skip or len(buffer) - position < HEADER.size:
                break
            length, stream_id, kind, flags = HEADER.unpack_from(buffer, position)
            if kind not in (REQUEST, RESPONSE, DATA):
                raise FrameError(f"cannot read frame: unknown type {kind}")
            if length > DATA_SIZE_MAX:
                position += HEADER.size
                self._skip = length
                frames.append(Frame(stream_id, kind, flags, b"", oversized=True))
                continue
            end = position + HEADER.size + length
            if len(buffer) < end:
                break
            frames.append(Frame(stream_id, kind, flags, bytes(buffer[position + HEADER.size : end])))
            position = end
        del buffer[:position]
        return frames


def encode_frame(stream_id: int, kind: int, data: bytes) -> bytes:
    return HEADER.pack(len(data), stream_id, kind, 0) + data


def encode_request(stream_id: int, service: str, method: str, payload: bytes, timeout_nano: int = 0) -> bytes:
    """Return a request frame. Raises RpcError (RESOURCE_EXHAUSTED) if the payload does not fit into one."""
    request = ttrpc_pb2.Request(service=service, method=method, payload=payload, timeout_nano=timeout_nano)
    data = request.SerializeToString()
    if len(data) > DATA_SIZE_MAX:
        raise RpcError(
            StatusCode.RESOURCE_EXHAUSTED,
            f"cannot call {method}: its {len(data)} bytes exceed the {DATA_SIZE_MAX} of a frame",
        )
    return encode_frame(stream_id, REQUEST, data)


def encode_response(stream_id: int, payload: bytes = b"", code: int = 0, message: str = "") -> bytes:
    """Return a response frame; an answer too large for a frame becomes an error."""
    response = ttrpc_pb2.Response(payload=payload)
    if code:
        response.status.code = code
        # a file name that is not UTF-8 has lone surrogates, which protobuf rejects
        response.status.message = message[:MESSAGE_MAX].encode(errors="replace").decode()
    data = response.SerializeToString()
    if len(data) > DATA_SIZE_MAX:
        return encode_response(
            stream_id,
            code=StatusCode.RESOURCE_EXHAUSTED,
            message=f"the response is too large: {len(data)} bytes",
        )
    return encode_frame(stream_id, RESPONSE, data)


def parse_request(frame: Frame) -> ttrpc_pb2.Request:
    """Return the request in `frame`. Raises RpcError with the status to answer it with."""
    if frame.oversized:
        raise RpcError(StatusCode.RESOURCE_EXHAUSTED, f"the request is larger than {DATA_SIZE_MAX} bytes")
    if frame.kind != REQUEST:
        raise RpcError(StatusCode.INVALID_ARGUMENT, "only unary requests are supported")
    if frame.stream_id % 2 == 0:
        raise RpcError(StatusCode.INVALID_ARGUMENT, f"stream id {frame.stream_id} is even: clients use odd ones")
    try:
        return ttrpc_pb2.Request.FromString(frame.data)
    except Exception as exc:
        raise RpcError(StatusCode.INVALID_ARGUMENT, f"cannot parse the request: {exc}") from exc


def parse_response(frame: Frame) -> bytes:
    """Return the payload of the response in `frame`. Raises RpcError if it reports a failure or cannot be parsed."""
    if frame.oversized:
        raise RpcError(StatusCode.RESOURCE_EXHAUSTED, f"the answer is larger than {DATA_SIZE_MAX} bytes")
    try:
        response = ttrpc_pb2.Response.FromString(frame.data)
    except Exception as exc:
        raise RpcError(StatusCode.INTERNAL, f"cannot parse the answer: {exc}") from exc
    if response.status.code:
        raise RpcError(response.status.code, response.status.message[:MESSAGE_MAX])
    return response.payload
