"""Ports of the host, held while they are published.

The kernel forwards by rules that know no owner: a second container, or a server of the host, would take or lose its
traffic in silence. A socket bound to the port keeps everybody else away, and goes with its process.
"""

import contextlib
import errno
import socket

from katapod.model.attachment import PublishedPort
from katapod.model.errors import AlreadyExists, KatapodError, UsageError
from katapod.model.net_flags import PortRequest

__all__ = ["hold_ports"]


def hold_ports(requests: tuple[PortRequest, ...], stack: contextlib.ExitStack) -> tuple[PublishedPort, ...]:
    """Bind all ports, which are free again when `stack` is closed. Raises AlreadyExists, UsageError, KatapodError."""
    return tuple(_hold(request, stack) for request in requests)


def _hold(request: PortRequest, stack: contextlib.ExitStack) -> PublishedPort:
    for number in range(request.host_first, request.host_last + 1):
        held = _bind(request, number)
        if held is not None:
            stack.callback(held.close)
            return PublishedPort(held.getsockname()[1], request.container_port, request.protocol, request.host_ip)
    first, last = request.host_first, request.host_last
    shown = f"{first}/{request.protocol}" if first == last else f"{first}-{last}/{request.protocol}"
    where = f" on {request.host_ip}" if request.host_ip else ""
    raise AlreadyExists(
        f"cannot publish port {shown}{where}: it is in use on this host"
        if first == last
        else f"cannot publish one of the ports {shown}{where}: all are in use on this host",
        hint="choose another with -p, or see who has it: kata-runtime list; ss -lntup",
    )


def _bind(request: PortRequest, number: int) -> socket.socket | None:
    """A socket that has the port; None if it is in use."""
    family = socket.AF_INET6 if ":" in request.host_ip else socket.AF_INET
    kind = socket.SOCK_STREAM if request.protocol == "tcp" else socket.SOCK_DGRAM
    for again in (False, True):
        held = socket.socket(family, kind | socket.SOCK_CLOEXEC)
        try:
            if again:  # connections that have ended hold the port for a while (TIME_WAIT), and do no harm
                held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.bind((request.host_ip, number))
            if again:
                held.listen(1)
        except OSError as exc:
            held.close()
            if exc.errno == errno.EADDRINUSE:
                if request.protocol == "udp" or again:
                    return None
                continue
            if exc.errno == errno.EADDRNOTAVAIL:
                raise UsageError(f"cannot publish on {request.host_ip}: this host does not have the address") from exc
            raise KatapodError(f"cannot publish port {number}/{request.protocol}: {exc.strerror}") from exc
        return held
    raise AssertionError("unreachable")
