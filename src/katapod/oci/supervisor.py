"""The process that holds a VM for OCI commands, from its first container to the end of the last.

It serves a unix socket: a message each, in the order of a connection (wire.py). Nothing is decided here.
"""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from functools import partial

from katapod.host.log_lines import log_to
from katapod.host.own_mounts import leave_host_mounts
from katapod.host.state import StateStore
from katapod.host.trace import start_tracing
from katapod.model.errors import KatapodError
from katapod.model.layout import Layout
from katapod.oci import wire
from katapod.oci.connection import Connection
from katapod.oci.containers import Containers
from katapod.oci.errors import OciError
from katapod.oci.records import SupervisorDir
from katapod.sandbox.configuration import read_config
from katapod.sandbox.errors import CommandNotExecutable, CommandNotFound
from katapod.tasks import Background

__all__ = ["serve_forever"]

log = logging.getLogger(__name__)


def serve_forever(
    place: SupervisorDir, sandbox_id: str, config: str, listener_fd: int, first_fd: int, *, debug: bool
) -> None:
    """Serve until no container is left; then neither the sandbox nor `place` is. The command that started us is
    connected at `first_fd`."""
    gc.freeze()
    log_to(None, logging.DEBUG if debug else logging.INFO, "%(asctime)s %(levelname)s %(name)s: %(message)s")
    os.chdir("/")
    leave_host_mounts()
    start_tracing(interpreter=False)
    listener, first = socket.socket(fileno=listener_fd), socket.socket(fileno=first_fd)
    try:
        asyncio.run(_Server(place, sandbox_id, config, listener).run(first))
    finally:
        place.remove()


class _Server:
    def __init__(self, place: SupervisorDir, sandbox_id: str, config: str, listener: socket.socket) -> None:
        self._place = place
        self._listener = listener
        self._finished = asyncio.Event()
        self._answering = 0
        self._connections = Background()
        self._containers = Containers(
            os.path.dirname(place.path), sandbox_id, StateStore(Layout()), partial(read_config, config)
        )
        self._verbs: dict[str, Callable[[Connection, wire.Message], Awaitable[wire.Message | None]]] = {
            "create": self._containers.create,
            "start": self._containers.start,
            "kill": self._containers.kill,
            "delete": self._containers.delete,
            "exec": self._containers.exec,
            "pause": self._containers.pause,
            "resume": self._containers.resume,
            "update": self._containers.update,
            "ps": self._containers.processes,
            "stats": self._containers.stats,
        }

    async def run(self, first: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._finished.set)
        self._listener.setblocking(False)
        loop.add_reader(self._listener, self._accept)
        self._connections.start(self._serve(first), name="first")
        try:
            await self._finished.wait()
        finally:
            loop.remove_reader(self._listener)
            self._listener.close()
            try:
                await self._containers.end()
            finally:
                self._place.remove()  # before commands hear that all has gone
                await self._connections.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it has gone already
            connection, _ = self._listener.accept()
            self._connections.start(self._serve(connection), name="connection")

    async def _serve(self, raw: socket.socket) -> None:
        raw.setblocking(False)
        with Connection(raw) as connection:
            with contextlib.suppress(wire.Gone, OSError):
                while not self._finished.is_set():
                    message = await connection.hear()
                    self._answering += 1
                    try:
                        await self._carry_out(connection, message)
                    finally:
                        self._answering -= 1
                        self._look_for_end()
                await asyncio.Event().wait()  # the command hears the end of the connection when all is gone
            self._look_for_end()  # also if the command has gone before it said what it wants

    def _look_for_end(self) -> None:
        """Two commands may be deleting at the same time: each gets its answer."""
        if self._containers.empty and not self._answering:
            self._finished.set()

    async def _carry_out(self, connection: Connection, message: wire.Message) -> None:
        verb = str(message.get("do"))
        try:
            if verb not in self._verbs:
                raise OciError(f"unknown command {verb!r}")
            answer = await self._verbs[verb](connection, message) or {}
        except (OciError, KatapodError, OSError) as exc:
            log.info("%s of %s: %s", verb, message.get("id"), exc)
            answer = {"error": _explained(exc)}
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            log.exception("%s of %s", verb, message.get("id"))
            answer = {"error": f"internal error: {type(exc).__name__}: {exc}"}
        finally:
            connection.close_fds()
        await connection.say(answer)


def _explained(exc: Exception) -> str:
    """In the words that engines look for: Podman's exit statuses 126 and 127 come of them."""
    text = str(exc) + (f" ({exc.hint})" if isinstance(exc, KatapodError) and exc.hint else "")
    known = ("executable file not found in", "no such file or directory")
    if isinstance(exc, CommandNotFound) and not any(words in text.lower() for words in known):
        return f"{text}: No such file or directory"
    if isinstance(exc, CommandNotExecutable) and "permission denied" not in text.lower():
        return f"{text}: permission denied"
    return text
