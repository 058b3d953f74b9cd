"""The other side of exec_client.py, in the process that holds a sandbox of `run`.

A request is read and carried out as its client would do it, over the control socket too, so that both end in the same
ways. Only the client's streams and signals come to us. Until the command runs, whatever is wrong is refused, and the
client finds it out and says it itself.
"""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable

from msgspec import Struct

from katapod import __version__
from katapod.host.listener import bound_listener
from katapod.model.errors import KatapodError
from katapod.model.plain import LINES, plain
from katapod.sandbox.execs import ExecRequest
from katapod.sandbox.lifecycle import Sandbox
from katapod.supervisor import pool_wire as wire
from katapod.supervisor.request_reader import RequestReader
from katapod.tasks import Background, beside

__all__ = ["ExecCommand", "ReadExec", "exec_server"]

log = logging.getLogger(__name__)

DESCRIPTORS = 3
ENDED = "the container has ended"
REQUEST_LIMIT_S = 2.0  # for a client that has connected to say what it wants
GO_LIMIT_S = 30.0  # for its word that we may begin: once it has given that, it does not go back


class ExecCommand(Struct, frozen=True):
    """`name`: of the container, as it was given."""

    name: str
    request: ExecRequest
    interactive: bool


ReadExec = Callable[[list[str]], ExecCommand | None]
"""Reads the words behind `exec`. None, and any error, is what only their caller can do."""


@contextlib.asynccontextmanager
async def exec_server(sandbox: Sandbox, read: ReadExec) -> AsyncIterator[None]:
    """Serve execs in the sandbox's container while the block runs; those under way go on until the VM has ended."""
    if sandbox.record.pod:  # whose id may be that of a container as well
        yield
        return
    server = _Server(sandbox, read)
    sandbox.afterwards.push_async_callback(server.execs.close)
    loop = asyncio.get_running_loop()
    with bound_listener(sandbox.paths.exec_socket) as listener:
        loop.add_reader(listener, server.accept, listener)
        try:
            yield
        finally:
            loop.remove_reader(listener)


class _Server:
    def __init__(self, sandbox: Sandbox, read: ReadExec) -> None:
        self.execs = Background()
        self._sandbox = sandbox
        self._read = read

    def accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it has gone already
            connection, _ = listener.accept()
            connection.setblocking(False)
            self.execs.start(self._serve(connection), name="exec")

    async def _serve(self, connection: socket.socket) -> None:
        reader = RequestReader(DESCRIPTORS)
        with connection:
            try:
                async with asyncio.timeout(REQUEST_LIMIT_S):
                    request = await _receive_request(connection, reader)
                    command = self._command_of(request)
                    await _say(connection, wire.TAKEN if command is not None else wire.REFUSED)
                async with asyncio.timeout(GO_LIMIT_S):
                    if command is None or await _receive(connection, wire.HEADER) != wire.frame(wire.GO):
                        return
                await self._carry_out(connection, command, reader.fds)
            except (OSError, wire.FrameError) as exc:
                log.debug("a client of exec went away: %s", exc)
            finally:
                for fd in reader.fds:
                    os.close(fd)

    def _command_of(self, request: wire.Request) -> ExecCommand | None:
        if request.version != __version__.encode():
            return None
        try:
            command = self._read([os.fsdecode(word) for word in request.words])
        except Exception as exc:
            log.debug("an exec is left to its caller: %r", exc)
            return None
        return command if command is not None and command.name == self._sandbox.sandbox_id else None

    async def _carry_out(self, connection: socket.socket, command: ExecCommand, fds: list[int]) -> None:
        from katapod.supervisor.exec_run import started_exec
        from katapod.supervisor.foreground import carry_to, passing_signals

        name, started = command.name, False
        try:
            async with started_exec(self._sandbox.store, name, name, name, command.request) as process:
                started = True
                async with Background() as background:
                    pass_on = passing_signals(process, background)
                    work = carry_to(process, fds, interactive=command.interactive)
                    async with (
                        beside(work, name="carry", may_fail=True) as carrying,
                        beside(_hear(connection, pass_on), name="hear") as gone,
                    ):
                        await asyncio.wait({carrying, gone}, return_when=asyncio.FIRST_COMPLETED)
                        if not carrying.done():
                            return
                        await _say(connection, wire.EXIT, b"%d" % carrying.result())
        except asyncio.CancelledError:
            with contextlib.suppress(OSError):  # without a word it would look as if we had been killed
                connection.send(wire.frame(wire.FAILED, f"the command in {name} was cut off: {ENDED}".encode()))
            raise
        except KatapodError as exc:
            if started or self._sandbox.death.done():  # who asks again would only hear that it is stopped
                await _say(connection, wire.FAILED, plain(str(exc), keep=LINES).encode(errors="replace"))
            else:
                await _say(connection, wire.REFUSED)


async def _hear(connection: socket.socket, pass_on: Callable[[int], None]) -> None:
    """Pass on the client's signals until it has gone."""
    with contextlib.suppress(OSError, ValueError, wire.FrameError):
        while True:
            length, kind = wire.parse_header(await _receive(connection, wire.HEADER))
            payload = await _receive(connection, length)
            if kind == wire.SIGNAL:
                pass_on(int(payload))


async def _receive_request(connection: socket.socket, reader: RequestReader) -> wire.Request:
    """Raises FrameError, OSError."""
    while True:
        await _readable(connection)
        if (request := reader.read(connection)) is not None:
            return request


async def _receive(connection: socket.socket, size: int) -> bytes:
    loop = asyncio.get_running_loop()
    data = b""
    while len(data) < size:
        piece = await loop.sock_recv(connection, size - len(data))
        if not piece:
            raise wire.FrameError("the client has gone")
        data += piece
    return data


async def _say(connection: socket.socket, kind: bytes, payload: bytes = b"") -> None:
    await asyncio.get_running_loop().sock_sendall(connection, wire.frame(kind, payload))


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_reader(connection, lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_reader(connection)
