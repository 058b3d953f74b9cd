"""The client of a raw debug console: bytes to and from a shell, on a vsock port of the guest.

That is all that upstream's agent has: no size of the terminal, and no exit status.
"""

import asyncio
import contextlib
import re
import socket

from katapod.host.vsock import connect_vsock
from katapod.model.errors import KatapodError
from katapod.sandbox.stdio import InputFd, OutputFd, Sink, Source
from katapod.tasks import beside

__all__ = ["carry_raw", "dial_vsock"]

CHUNK = 64 * 1024
DIAL_LIMIT_S = 10.0
_URL = re.compile(r"vsock://(\d{1,10}):\d{1,10}")


async def dial_vsock(agent_url: str, port: int, sandbox_id: str) -> socket.socket:
    """Connect to `port` of the guest whose agent is at `agent_url` (vsock://CID:PORT). Raises KatapodError."""
    found = _URL.fullmatch(agent_url.strip())
    if found is None:
        raise KatapodError(f"cannot reach port {port} of {sandbox_id}: its agent is at {agent_url!r}, not on vsock")
    try:
        async with asyncio.timeout(DIAL_LIMIT_S):
            return await connect_vsock(int(found[1]), port)
    except OSError as exc:  # a TimeoutError is one
        raise KatapodError(
            f"cannot reach the debug console of {sandbox_id} on vsock port {port}: {exc.strerror or 'no answer'}",
            hint="set debug_console_enabled = true in [agent.kata] of configuration.toml, and start the pod again",
        ) from exc


async def carry_raw(sock: socket.socket, source: Source | None = None, sink: Sink | None = None) -> None:
    """Carry standard input and output (unless others are given) until the guest closes; closes `sock`.

    The end of our input is typed, as Ctrl-D, and what the guest says until its end is carried still.
    Raises BrokenPipeError when nobody reads our output any more.
    """
    source, sink = source or InputFd(0), sink or OutputFd(1)
    loop = asyncio.get_running_loop()
    sock.setblocking(False)

    async def feed() -> None:
        with contextlib.suppress(OSError):  # the guest has closed
            while data := await source.read(CHUNK):
                await loop.sock_sendall(sock, data)
            await loop.sock_sendall(sock, b"\x04")

    with contextlib.closing(sock):
        async with beside(feed(), name="stdin"):
            with contextlib.suppress(ConnectionResetError):
                while data := await loop.sock_recv(sock, CHUNK):
                    await sink.write(data)
