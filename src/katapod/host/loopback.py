"""A listener for whatever port of a network namespace's loopback somebody connects to (kernel/bpf.py)."""

import contextlib
import os
import socket
from pathlib import Path

from msgspec import Struct

from katapod.host.netns import in_netns
from katapod.host.own_mounts import in_host_mounts
from katapod.kernel.bpf import Target, attach_lookup

__all__ = ["LoopbackListener", "listen_on_loopback"]

LOOPBACK, LOOPBACK6 = "127.0.0.1", "::1"
DOCKER_RESOLVER = "127.0.0.11"
"""Where dockerd itself listens in the network namespaces of containers: what comes there is not for the guest. Source:
docs.docker.com, "Networking overview", DNS services."""
BACKLOG = 64
_IPV6_FREEBIND, _IP_FREEBIND = 78, 15


class LoopbackListener(Struct):
    """Listening sockets, not blocking, one for each family that there is. What they accept has as its own address the
    one that the client asked for. The supervisor calls `close`, which is idempotent."""

    sockets: tuple[socket.socket, ...]
    link_fd: int

    def close(self) -> None:
        if self.link_fd >= 0:
            os.close(self.link_fd)
            self.link_fd = -1
        for each in self.sockets:
            each.close()


def listen_on_loopback(netns: Path) -> LoopbackListener:
    """Listen for TCP connections to 127.0.0.0/8 and ::1 of the namespace, any port. Raises OSError; blocks."""
    with contextlib.ExitStack() as undo:
        sockets = in_netns(netns, lambda: _listen(undo))
        rules: list[tuple[Target, socket.socket | None]] = [
            (Target(socket.IPPROTO_TCP, socket.inet_aton(DOCKER_RESOLVER)), None)
        ]
        for each in sockets:
            address = bytes([127]) if each.family == socket.AF_INET else socket.inet_pton(socket.AF_INET6, LOOPBACK6)
            rules.append((Target(socket.IPPROTO_TCP, address, family=each.family), each))
        netns_fd = in_host_mounts(lambda: os.open(netns, os.O_RDONLY | os.O_CLOEXEC))
        try:
            link_fd = attach_lookup(netns_fd, rules)
        finally:
            os.close(netns_fd)
        undo.pop_all()
        return LoopbackListener(sockets, link_fd)


def _listen(undo: contextlib.ExitStack) -> tuple[socket.socket, ...]:
    """IPv4 first. Loopback may not be up yet, hence FREEBIND: nothing from elsewhere may ever reach these ports."""
    found = []
    for family, address, level, option in (
        (socket.AF_INET, LOOPBACK, socket.IPPROTO_IP, _IP_FREEBIND),
        (socket.AF_INET6, LOOPBACK6, socket.IPPROTO_IPV6, _IPV6_FREEBIND),
    ):
        try:
            listener = undo.enter_context(socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
            listener.setsockopt(level, option, 1)
            listener.bind((address, 0))
            listener.listen(BACKLOG)
        except OSError:
            if family == socket.AF_INET:
                raise
            continue  # a host without IPv6
        found.append(listener)
    return tuple(found)
