"""rtnetlink(7): links, addresses, routes and neighbours of the network namespace that a socket was made in.

Numbers are those of linux/rtnetlink.h, if_link.h, if_addr.h and neighbour.h. Addresses are bytes in network order,
4 or 16 of them, so that their length tells the family.
"""

from __future__ import annotations

import _socket
import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["IFF_LOOPBACK", "IFF_NOARP", "IFF_UP", "Address", "Link", "Netlink", "Route", "attribute"]

IFF_UP, IFF_LOOPBACK, IFF_NOARP = 0x1, 0x8, 0x80
RTN_UNICAST = 1
RT_TABLE_MAIN = 254
RTPROT_KERNEL, RTPROT_STATIC = 2, 4
NUD_PERMANENT = 0x80
METRIC6 = 1024  # what the kernel gives an IPv6 route that asks for none

_NEW_LINK, _DEL_LINK, _GET_LINK = 16, 17, 18
_NEW_ADDR, _DEL_ADDR, _GET_ADDR = 20, 21, 22
_NEW_ROUTE, _DEL_ROUTE, _GET_ROUTE = 24, 25, 26
_NEW_NEIGH = 28
_ERROR, _DONE = 2, 3
_REQUEST, _ACK, _REPLACE, _DUMP, _CREATE = 0x1, 0x4, 0x100, 0x300, 0x400
_IFA_F_NODAD = 0x02
_AF_INET, _AF_INET6 = 2, 10
_RECEIVE_BYTES = 65536

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_LINK = struct.Struct("=BxHiII")
_ADDRESS = struct.Struct("=BBBBI")
_ROUTE = struct.Struct("=BBBBBBBBI")
_NEIGHBOUR = struct.Struct("=BxxxiHBB")
_U32 = struct.Struct("=I")


class Link:
    """An interface. `mac` is empty for one that has none; `kind` as ip-link(8) calls its type, empty for hardware.
    `peer` is the index of a veth's other end, or of what a device stands on; `master` that of the bridge it is in."""

    def __init__(
        self, index: int, name: str, mtu: int, mac: bytes, flags: int, *, peer: int = 0, master: int = 0, kind: str = ""
    ) -> None:
        self.index = index
        self.name = name
        self.mtu = mtu
        self.mac = mac
        self.flags = flags
        self.peer = peer
        self.master = master
        self.kind = kind


class Address:
    def __init__(self, index: int, address: bytes, prefix: int, scope: int) -> None:
        self.index = index
        self.address = address
        self.prefix = prefix
        self.scope = scope


class Route:
    """A unicast route of the main table. Empty bytes: no gateway, no preferred source, the default destination
    (then `family` tells which)."""

    def __init__(
        self,
        family: int,
        dest: bytes,
        prefix: int,
        *,
        index: int = 0,
        gateway: bytes = b"",
        source: bytes = b"",
        scope: int = 0,
        flags: int = 0,
        mtu: int = 0,
        priority: int = 0,
        protocol: int = RTPROT_STATIC,
    ) -> None:
        self.family = family
        self.dest = dest
        self.prefix = prefix
        self.index = index
        self.gateway = gateway
        self.source = source
        self.scope = scope
        self.flags = flags
        self.mtu = mtu
        self.priority = priority
        self.protocol = protocol


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute with its padding to four bytes."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def _attributes(data: bytes) -> dict[int, bytes]:
    found = {}
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if length < _ATTRIBUTE.size:
            break
        found[kind & 0x3FFF] = data[_ATTRIBUTE.size : length]
        data = data[(length + 3) & ~3 :]
    return found


def _number(value: bytes | None) -> int:
    return int(_U32.unpack(value)[0]) if value and len(value) == _U32.size else 0


def _family(address: bytes) -> int:
    return _AF_INET6 if len(address) == 16 else _AF_INET


class Netlink:
    """One socket; every method is one request and raises OSError with what the kernel says of it."""

    def __init__(self) -> None:
        self._socket = _socket.socket(_socket.AF_NETLINK, _socket.SOCK_RAW | _socket.SOCK_CLOEXEC)
        self._sequence = 0

    def __enter__(self) -> Netlink:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close()

    def links(self) -> list[Link]:
        return [_parse_link(body) for body in self._ask(_GET_LINK, _DUMP, _LINK.pack(0, 0, 0, 0, 0))]

    def change_link(
        self, index: int, *, name: str = "", mtu: int = 0, up: bool | None = None, noarp: bool | None = None
    ) -> None:
        """Change what is given; a link that is up takes no other name."""
        flags = (IFF_UP if up else 0) | (IFF_NOARP if noarp else 0)
        change = (IFF_UP if up is not None else 0) | (IFF_NOARP if noarp is not None else 0)
        body = _LINK.pack(0, 0, index, flags, change)
        if name:
            body += attribute(3, name.encode() + b"\0")
        if mtu:
            body += attribute(4, _U32.pack(mtu))
        self._ask(_NEW_LINK, _ACK, body)

    def delete_link(self, index: int) -> None:
        self._ask(_DEL_LINK, _ACK, _LINK.pack(0, 0, index, 0, 0))

    def addresses(self, index: int = 0) -> list[Address]:
        """Of one link, or of all."""
        found = [_parse_address(body) for body in self._ask(_GET_ADDR, _DUMP, _ADDRESS.pack(0, 0, 0, 0, 0))]
        return [address for address in found if index in (0, address.index)]

    def add_address(self, index: int, address: bytes, prefix: int) -> None:
        """Without duplicate address detection: it can be used at once."""
        body = _ADDRESS.pack(_family(address), prefix, 0, 0, index) + attribute(2, address) + attribute(1, address)
        if len(address) == 16:
            body += attribute(8, _U32.pack(_IFA_F_NODAD))
        elif prefix < 31:
            host_bits = (1 << (32 - prefix)) - 1
            body += attribute(4, (int.from_bytes(address, "big") | host_bits).to_bytes(4, "big"))
        self._ask(_NEW_ADDR, _ACK | _CREATE | _REPLACE, body)

    def delete_address(self, address: Address) -> None:
        body = _ADDRESS.pack(_family(address.address), address.prefix, 0, 0, address.index)
        self._ask(_DEL_ADDR, _ACK, body + attribute(2, address.address))

    def routes(self) -> list[Route]:
        """The unicast routes of the main table, both families, also those that the kernel made."""
        found = (_parse_route(body) for body in self._ask(_GET_ROUTE, _DUMP, _ROUTE.pack(*[0] * 9)))
        return [route for route in found if route is not None]

    def add_route(self, route: Route) -> None:
        self._ask(_NEW_ROUTE, _ACK | _CREATE | _REPLACE, _route_body(route))

    def delete_route(self, route: Route) -> None:
        self._ask(_DEL_ROUTE, _ACK, _route_body(route))

    def add_neighbour(self, index: int, address: bytes, mac: bytes, *, state: int = NUD_PERMANENT) -> None:
        body = _NEIGHBOUR.pack(_family(address), index, state, 0, 0) + attribute(1, address) + attribute(2, mac)
        self._ask(_NEW_NEIGH, _ACK | _CREATE | _REPLACE, body)

    def _ask(self, kind: int, flags: int, body: bytes) -> list[bytes]:
        self._sequence += 1
        self._socket.send(_HEADER.pack(_HEADER.size + len(body), kind, flags | _REQUEST, self._sequence, 0) + body)
        answers: list[bytes] = []
        while True:
            for answer, data in self._messages():
                if answer == _DONE:
                    return answers
                if answer == _ERROR:
                    error = -int.from_bytes(data[:4], "little", signed=True)
                    if error:
                        raise OSError(error, os.strerror(error))
                    return answers
                answers.append(data)

    def _messages(self) -> Iterator[tuple[int, bytes]]:
        """What the kernel sends next, of our request."""
        data = self._socket.recv(_RECEIVE_BYTES)
        while len(data) >= _HEADER.size:
            length, kind, _, sequence, _ = _HEADER.unpack_from(data)
            if length < _HEADER.size:
                return
            if sequence == self._sequence:
                yield kind, data[_HEADER.size : length]
            data = data[(length + 3) & ~3 :]


def _parse_link(body: bytes) -> Link:
    _, _, index, flags, _ = _LINK.unpack_from(body)
    found = _attributes(body[_LINK.size :])
    return Link(
        index,
        _text(found.get(3, b"")),
        _number(found.get(4)),
        found.get(1, b""),
        flags,
        peer=_number(found.get(5)),
        master=_number(found.get(10)),
        kind=_text(_attributes(found.get(18, b"")).get(1, b"")),
    )


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")


def _parse_address(body: bytes) -> Address:
    _, prefix, _, scope, index = _ADDRESS.unpack_from(body)
    found = _attributes(body[_ADDRESS.size :])
    return Address(index, found.get(2) or found.get(1, b""), prefix, scope)


def _parse_route(body: bytes) -> Route | None:
    family, prefix, _, _, table, protocol, scope, kind, flags = _ROUTE.unpack_from(body)
    found = _attributes(body[_ROUTE.size :])
    if kind != RTN_UNICAST or (_number(found.get(15)) or table) != RT_TABLE_MAIN:
        return None
    return Route(
        family,
        found.get(1, b""),
        prefix,
        index=_number(found.get(4)),
        gateway=found.get(5, b""),
        source=found.get(7, b""),
        scope=scope,
        flags=flags & 0x4,
        mtu=_number(_attributes(found.get(8, b"")).get(2)),
        priority=_number(found.get(6)),
        protocol=protocol,
    )


def _route_body(route: Route) -> bytes:
    body = _ROUTE.pack(
        route.family, route.prefix, 0, 0, RT_TABLE_MAIN, route.protocol, route.scope, RTN_UNICAST, route.flags
    )
    if route.dest:
        body += attribute(1, route.dest)
    if route.index:
        body += attribute(4, _U32.pack(route.index))
    if route.gateway:
        body += attribute(5, route.gateway)
    if route.priority:
        body += attribute(6, _U32.pack(route.priority))
    if route.source:
        body += attribute(7, route.source)
    if route.mtu:
        body += attribute(8, attribute(2, _U32.pack(route.mtu)))
    return body
