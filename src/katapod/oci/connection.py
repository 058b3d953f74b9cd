"""A command's connection, at the supervisor's end: messages with the descriptors that came beside them."""

import asyncio
import os
import socket
from types import TracebackType

from katapod.oci import wire

__all__ = ["Connection"]


class Connection:
    """Its descriptors and those of its messages are closed when the block ends."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._data = bytearray()
        self._fds: list[int] = []

    def __enter__(self) -> "Connection":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close_fds()
        self._socket.close()

    def close_fds(self) -> None:
        """Those that came and were not taken."""
        while self._fds:
            os.close(self._fds.pop())

    def take_fds(self, count: int) -> list[int]:
        """The caller's to close. Raises Gone if fewer came."""
        if len(self._fds) < count:
            raise wire.Gone(f"{count} descriptors were expected, not {len(self._fds)}")
        taken, self._fds = self._fds[:count], self._fds[count:]
        return taken

    async def hear(self) -> wire.Message:
        """Raises Gone, also at the end of the connection."""
        length = int.from_bytes(await self._exactly(wire.HEADER), "big")
        if length > wire.LENGTH_MAX:
            raise wire.Gone(f"a message of {length} bytes is too long")
        return wire.decode(await self._exactly(length))

    async def wait_gone(self) -> None:
        """Until the other side has gone, or speaks out of turn."""
        await self._readable()

    async def say(self, message: wire.Message) -> None:
        """Raises OSError."""
        await asyncio.get_running_loop().sock_sendall(self._socket, wire.encode(message))

    async def _exactly(self, size: int) -> bytes:
        while len(self._data) < size:
            await self._readable()
            try:
                piece, ancillary, _, _ = self._socket.recvmsg(
                    min(65536, size - len(self._data)),
                    socket.CMSG_SPACE(wire.FDS_MAX * 4),
                    socket.MSG_CMSG_CLOEXEC,
                )
            except BlockingIOError:
                continue
            except OSError as exc:
                raise wire.Gone(f"the command has gone: {exc.strerror}") from exc
            self._fds += wire.received_fds(ancillary)
            if not piece:
                raise wire.Gone("the command has gone")
            self._data += piece
        found = bytes(self._data[:size])
        del self._data[:size]
        return found

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        ready = loop.create_future()
        loop.add_reader(self._socket, lambda: None if ready.done() else ready.set_result(None))
        try:
            await ready
        finally:
            loop.remove_reader(self._socket)
