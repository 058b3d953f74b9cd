"""Ports of the host are held, and told apart from those in use."""

import contextlib
import socket

import pytest

from katapod.host.ports import hold_ports
from katapod.model.errors import AlreadyExists, UsageError
from katapod.model.net_flags import PortRequest


def request(first: int = 0, last: int | None = None, protocol: str = "tcp", ip: str = "127.0.0.1") -> PortRequest:
    last = first if last is None else last
    return PortRequest(container_port=80, host_first=first, host_last=last, protocol=protocol, host_ip=ip)


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_port_is_held_until_the_end(protocol: str) -> None:
    with contextlib.ExitStack() as stack:
        (held,) = hold_ports((request(protocol=protocol),), stack)
        assert held.host_port > 0
        assert (held.container_port, held.protocol, held.host_ip) == (80, protocol, "127.0.0.1")
        with contextlib.ExitStack() as other, pytest.raises(AlreadyExists, match=f"port {held.host_port}/{protocol}"):
            hold_ports((request(held.host_port, protocol=protocol),), other)
    with contextlib.ExitStack() as stack:
        hold_ports((request(held.host_port, protocol=protocol),), stack)


def test_a_server_of_the_host_has_its_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with contextlib.ExitStack() as stack, pytest.raises(AlreadyExists, match="in use"):
            hold_ports((request(port),), stack)


def test_a_connection_that_has_ended_does_not_hold_its_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = server.accept()
            accepted.close()  # first, so that it is the server's side that waits (TIME_WAIT)
            assert client.recv(1) == b""
    with contextlib.ExitStack() as stack:
        (held,) = hold_ports((request(port),), stack)
        assert held.host_port == port
        with contextlib.ExitStack() as other, pytest.raises(AlreadyExists):
            hold_ports((request(port),), other)


def test_one_of_a_range_that_is_free() -> None:
    with contextlib.ExitStack() as stack:
        (first,) = hold_ports((request(),), stack)
        (second,) = hold_ports((request(first.host_port, min(first.host_port + 50, 65535)),), stack)
        assert second.host_port > first.host_port


def test_an_address_of_somebody_else() -> None:
    with contextlib.ExitStack() as stack, pytest.raises(UsageError, match="does not have the address"):
        hold_ports((request(8080, ip="203.0.113.77"),), stack)
