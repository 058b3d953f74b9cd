"""Reads the request of a client (pool_wire.py) with its descriptors, as it comes."""

import socket

from katapod.supervisor import pool_wire as wire

__all__ = ["RequestReader"]

READ_SIZE = 65536


class RequestReader:
    """`descriptors`: how many come with it. Those that have come are in `fds`, the caller's to close whatever is
    raised."""

    def __init__(self, descriptors: int) -> None:
        self.fds: list[int] = []
        self._descriptors = descriptors
        self._data = bytearray()
        self._length = wire.HEADER

    def read(self, connection: socket.socket) -> wire.Request | None:
        """Take a piece; the request once it is whole. Raises FrameError, OSError; TimeoutError among them."""
        size = min(READ_SIZE, self._length - len(self._data))
        piece, more, _, _ = socket.recv_fds(connection, size, self._descriptors)
        self.fds += more
        if not piece:
            raise wire.FrameError("the client has gone")
        self._data += piece
        if len(self._data) == wire.HEADER == self._length:
            payload, kind = wire.parse_header(bytes(self._data))
            if kind != wire.REQUEST:
                raise wire.FrameError(f"a request was expected, not {kind!r}")
            self._length += payload
        if len(self._data) < self._length:
            return None
        if len(self.fds) != self._descriptors:
            raise wire.FrameError(f"{self._descriptors} descriptors were expected, not {len(self.fds)}")
        return wire.Request.decode(bytes(self._data[wire.HEADER :]))
