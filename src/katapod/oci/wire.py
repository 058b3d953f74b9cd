"""What commands and supervisors say to each other: a length of four bytes, and a JSON object, with descriptors beside.

Both are root's and of one installation. A command imports this, and so this imports little.
"""

from __future__ import annotations

import _socket
import array
import json
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

__all__ = ["FDS_MAX", "HEADER", "LENGTH_MAX", "Gone", "Message", "decode", "encode", "receive", "received_fds", "send"]

HEADER = 4
LENGTH_MAX = 16 << 20  # bytes: more than any config.json that runc reads
FDS_MAX = 16
if TYPE_CHECKING:
    Message = dict[str, Any]
else:
    Message = dict


class Gone(Exception):
    """The other side has ended, or does not keep to this."""


def encode(message: Message) -> bytes:
    data = json.dumps(message).encode()
    return len(data).to_bytes(HEADER, "big") + data


def decode(data: bytes) -> Message:
    """Raises Gone."""
    try:
        message = json.loads(data)
    except ValueError as exc:
        raise Gone(f"what came is no message: {exc}") from exc
    if not isinstance(message, dict):
        raise Gone("what came is no message")
    return message


def send(connection: _socket.socket, message: Message, fds: Sequence[int] = ()) -> None:
    """Raises Gone."""
    data = encode(message)
    rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    try:
        sent = connection.sendmsg([data], rights)
        if sent < len(data):  # of nothing it would still ask the kernel, and the other side may be done by now
            connection.sendall(data[sent:])
    except OSError as exc:
        raise Gone(f"the supervisor has gone: {exc.strerror}") from exc


def received_fds(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors that came beside some bytes; the caller's to close."""
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return list(fds)


def receive(connection: _socket.socket) -> Message:
    """The next message; descriptors are for supervisors alone. Raises Gone; TimeoutError if the socket has a limit."""

    def exactly(size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                piece = connection.recv(min(size - len(data), 1 << 20))
            except TimeoutError:
                raise
            except OSError as exc:
                raise Gone(f"the supervisor has gone: {os.strerror(exc.errno or 0)}") from exc
            if not piece:
                raise Gone("the supervisor has gone")
            data += piece
        return data

    length = int.from_bytes(exactly(HEADER), "big")
    if length > LENGTH_MAX:
        raise Gone(f"a message of {length} bytes is too long")
    return decode(exactly(length))
