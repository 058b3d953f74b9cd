"""Name servers on the loopback of a network namespace: whether one listens there, and questions put to it.

Docker has one in the namespace of each container in a network that a user has made: dockerd's own, at 127.0.0.11.
"""

import asyncio
import contextlib
import socket
from pathlib import Path

from katapod.host.netns import in_netns
from katapod.tasks import finish

__all__ = ["ask", "serves_names"]

PORT = 53
UDP_TABLE = Path("/proc/thread-self/net/udp")
MESSAGE_MAX = 65535  # bytes; RFC 1035, 4.2.2


def serves_names(netns: Path, address: str) -> bool:
    """Whether a UDP socket is bound to this IPv4 address in the namespace, at any port: dockerd's is at a port of its
    choice, to which rules there lead what is for port 53. Raises OSError."""
    word = socket.inet_aton(address)[::-1].hex().upper()  # as the kernel prints it; little endian
    table = in_netns(netns, UDP_TABLE.read_text)
    return any(line.split()[1].partition(":")[0] == word for line in table.splitlines()[1:])


async def ask(netns: Path, address: str, message: bytes, *, stream: bool) -> bytes:
    """The answer to one DNS message, by TCP if `stream`. Whoever calls limits the time. Raises OSError, EOFError."""
    loop = asyncio.get_running_loop()
    kind = socket.SOCK_STREAM if stream else socket.SOCK_DGRAM
    with contextlib.ExitStack() as stack:
        # a new one each time: where a rule has led an earlier one need not be where the server is now
        made = asyncio.to_thread(
            in_netns,
            netns,
            lambda: stack.enter_context(socket.socket(socket.AF_INET, kind | socket.SOCK_NONBLOCK)),
        )
        asking = await finish(made, name="open-socket")
        await loop.sock_connect(asking, (address, PORT))
        if not stream:
            await loop.sock_sendall(asking, message)
            return await loop.sock_recv(asking, MESSAGE_MAX)
        await loop.sock_sendall(asking, len(message).to_bytes(2, "big") + message)
        length = int.from_bytes(await _read(asking, 2), "big")
        return await _read(asking, length)


async def _read(asking: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        data = await asyncio.get_running_loop().sock_recv(asking, size - len(found))
        if not data:
            raise EOFError("the name server has closed the connection")
        found += data
    return found
