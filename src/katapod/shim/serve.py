"""The server process of a sandbox, from its socket to Shutdown."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable

from katapod.host.log_lines import log_to
from katapod.host.own_mounts import leave_host_mounts
from katapod.host.state import StateStore
from katapod.host.trace import start_tracing
from katapod.model.layout import Layout
from katapod.rpc.server import serve_ttrpc
from katapod.sandbox.configuration import read_config
from katapod.shim.arguments import Arguments
from katapod.shim.events import EventPublisher
from katapod.shim.idle import Connections, watch_use
from katapod.shim.service import TaskService
from katapod.shim.tasks import Tasks
from katapod.tasks import Background

__all__ = ["run_server"]

log = logging.getLogger(__name__)

LAST_EVENTS_S = 3.0
ANSWER_S = 0.1  # for the response to Shutdown to be sent


def run_server(arguments: Arguments, listener: socket.socket) -> None:
    """Serve until Shutdown or a signal; then neither the sandbox nor the socket is left."""
    logging.raiseExceptions = False  # a log without a reader must not block
    level = logging.DEBUG if arguments.debug else logging.INFO
    log_to(None, level, f"%(asctime)s level=%(levelname)s id={arguments.id} %(name)s: %(message)s")
    listener.set_inheritable(False)
    with contextlib.ExitStack() as file:
        file.callback(_unlink, listener.getsockname())
        leave_host_mounts()
        start_tracing(interpreter=False)
        asyncio.run(_serve(arguments, listener, file.close))


def _unlink(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


async def _serve(arguments: Arguments, listener: socket.socket, unlink: Callable[[], None]) -> None:
    """`unlink` removes the socket's file: first of all, so that a `start` that comes while we end begins another
    server, whose file is not ours to remove."""
    finished = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, finished.set)
    events = EventPublisher(os.environ.get("TTRPC_ADDRESS", ""), arguments.namespace)
    tasks = Tasks(arguments.namespace, StateStore(Layout()), read_config, events)
    connections = Connections()
    service = TaskService(tasks, finished.set)

    async def handle(name: str, method: str, payload: bytes) -> bytes:
        connections.count_call(1)
        try:
            return await service.handle(name, method, payload)
        finally:
            connections.count_call(-1)

    path = listener.getsockname()
    server = await serve_ttrpc(listener, handle, connections.count)
    background = Background()
    background.start(watch_use(tasks, connections, path, finished.set), name="watch-use")
    log.info("serving sandbox %s, pid %d", arguments.id, os.getpid())
    try:
        await finished.wait()
    finally:
        unlink()
        try:
            await background.close()
            await tasks.end()
        finally:
            await events.drain(LAST_EVENTS_S)
            await events.close()
            await asyncio.sleep(ANSWER_S)
            server.close()
            await server.wait_closed()
