"""Connections to guests by vsock(7), from a privileged port: by it an agent tells root of the host from others.

A port below 1024 takes CAP_NET_BIND_SERVICE. All processes of the host share them; a connection holds one until it is
closed.
"""

import asyncio
import errno
import random
import socket

__all__ = ["PRIVILEGED_PORT_MAX", "connect_vsock"]

PRIVILEGED_PORT_MAX = 1023


async def connect_vsock(cid: int, port: int) -> socket.socket:
    """Connect to `port` of the guest `cid`; the socket, which does not block, is the caller's. Raises OSError."""
    sock = _bound_socket()
    try:
        await asyncio.get_running_loop().sock_connect(sock, (cid, port))
    except BaseException:
        sock.close()
        raise
    return sock


def _bound_socket() -> socket.socket:
    """A socket with a privileged port that nobody else has. Raises OSError."""
    sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        first = random.randrange(PRIVILEGED_PORT_MAX)  # noqa: S311 - a random start skips most ports in use
        for step in range(PRIVILEGED_PORT_MAX):
            try:
                sock.bind((socket.VMADDR_CID_ANY, 1 + (first + step) % PRIVILEGED_PORT_MAX))
            except OSError as exc:
                if exc.errno != errno.EADDRINUSE:
                    raise
            else:
                return sock
        raise OSError(errno.EADDRINUSE, f"all {PRIVILEGED_PORT_MAX} privileged vsock ports of this host are in use")
    except BaseException:
        sock.close()
        raise
