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

__all__ = [
    "CARRIED_TYPES",
    "IFA_F_DEPRECATED",
    "IFA_F_NOPREFIXROUTE",
    "RTN_UNICAST",
    "IFF_LOOPBACK",
    "IFF_NOARP",
    "IFF_UP",
    "Address",
    "Link",
    "Netlink",
    "NextHop",
    "Route",
    "attribute",
]

IFF_UP, IFF_LOOPBACK, IFF_NOARP = 0x1, 0x8, 0x80
RTN_UNICAST = 1
CARRIED_TYPES = (RTN_UNICAST, 6, 7, 8, 9)  # blackhole, unreachable, prohibit, throw
RT_TABLE_MAIN = 254
RTPROT_KERNEL, RTPROT_STATIC = 2, 4
NUD_PERMANENT = 0x80
METRIC6 = 1024  # what the kernel uses for an IPv6 route without a metric

_NEW_LINK, _DEL_LINK, _GET_LINK = 16, 17, 18
_NEW_ADDR, _DEL_ADDR, _GET_ADDR = 20, 21, 22
_NEW_ROUTE, _DEL_ROUTE, _GET_ROUTE = 24, 25, 26
_NEW_NEIGH = 28
_ERROR, _DONE = 2, 3
_REQUEST, _ACK, _REPLACE, _DUMP, _CREATE, _APPEND = 0x1, 0x4, 0x100, 0x300, 0x400, 0x800
_IFA_F_NODAD, IFA_F_DEPRECATED, IFA_F_NOPREFIXROUTE = 0x02, 0x20, 0x200
_FOR_EVER = 0xFFFFFFFF
_AF_INET, _AF_INET6 = 2, 10
_RECEIVE_BYTES = 65536

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_LINK = struct.Struct("=BxHiII")
_ADDRESS = struct.Struct("=BBBBI")
_ROUTE = struct.Struct("=BBBBBBBBI")
_NEXTHOP = struct.Struct("=HBBi")
_NEIGHBOUR = struct.Struct("=BxxxiHBB")
_U32 = struct.Struct("=I")


class Link:
    """An interface. `mac` is empty if it has none; `kind` is its type as in ip-link(8), empty for hardware.
    `peer` is the index of a veth's other end, or of the lower device; `master` that of its bridge."""

    # long: a parameter for each attribute of a link that we use
    def __init__(
        self,
        index: int,
        name: str,
        mtu: int,
        mac: bytes,
        flags: int,
        *,
        peer: int = 0,
        master: int = 0,
        kind: str = "",
        tx_queue_len: int = 0,
    ) -> None:
        self.index = index
        self.name = name
        self.mtu = mtu
        self.mac = mac
        self.flags = flags
        self.peer = peer
        self.master = master
        self.kind = kind
        self.tx_queue_len = tx_queue_len


class Address:
    """`peer` is empty where there is none; `broadcast` None means the subnet's last address, empty bytes none.
    `flags` are IFA_F_*; `metric` is that of the route that the kernel adds, 0 for its default."""

    # long: a parameter for each attribute of an address that we use
    def __init__(
        self,
        index: int,
        address: bytes,
        prefix: int,
        scope: int = 0,
        *,
        peer: bytes = b"",
        flags: int = 0,
        metric: int = 0,
        label: str = "",
        broadcast: bytes | None = None,
    ) -> None:
        self.index = index
        self.address = address
        self.prefix = prefix
        self.scope = scope
        self.peer = peer
        self.flags = flags
        self.metric = metric
        self.label = label
        self.broadcast = broadcast


class NextHop:
    def __init__(self, index: int, gateway: bytes = b"", weight: int = 1, flags: int = 0) -> None:
        self.index = index
        self.gateway = gateway
        self.weight = weight
        self.flags = flags


class Route:
    """A route of the main table as administrators add them: unicast, or of a type that rejects. Empty bytes: no
    gateway, no preferred source, the default destination (then `family` tells which). A gateway may be of the other
    family. `metrics` are RTAX_* numbers with their values, without the MTU."""

    # long: a parameter for each attribute of a route that we use
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
        type: int = RTN_UNICAST,
        tos: int = 0,
        metrics: dict[int, int] | None = None,
        congestion: str = "",
        nexthops: tuple[NextHop, ...] = (),
        preference: int = 0,
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
        self.type = type
        self.tos = tos
        self.metrics = metrics or {}
        self.congestion = congestion
        self.nexthops = nexthops
        self.preference = preference


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
    """One socket; every method is one request and raises OSError with the kernel's error."""

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
        self,
        index: int,
        *,
        name: str = "",
        mtu: int = 0,
        up: bool | None = None,
        flags: int = 0,
        mask: int = 0,
        tx_queue_len: int = 0,
    ) -> None:
        """Change what is given, and the flags in `mask`. A link that is up cannot be renamed."""
        flags = flags & mask | (IFF_UP if up else 0)
        change = mask | (IFF_UP if up is not None else 0)
        body = _LINK.pack(0, 0, index, flags, change)
        if name:
            body += attribute(3, name.encode() + b"\0")
        if mtu:
            body += attribute(4, _U32.pack(mtu))
        if tx_queue_len:
            body += attribute(13, _U32.pack(tx_queue_len))
        self._ask(_NEW_LINK, _ACK, body)

    def delete_link(self, index: int) -> None:
        self._ask(_DEL_LINK, _ACK, _LINK.pack(0, 0, index, 0, 0))

    def addresses(self, index: int = 0) -> list[Address]:
        """Addresses of one link, or of all."""
        found = [_parse_address(body) for body in self._ask(_GET_ADDR, _DUMP, _ADDRESS.pack(0, 0, 0, 0, 0))]
        return [address for address in found if index in (0, address.index)]

    def add_address(self, address: Address) -> None:
        """Without duplicate address detection: the address can be used at once."""
        self._ask(_NEW_ADDR, _ACK | _CREATE | _REPLACE, _address_body(address))

    def delete_address(self, address: Address) -> None:
        body = _ADDRESS.pack(_family(address.address), address.prefix, 0, 0, address.index)
        body += attribute(2, address.address) + (attribute(1, address.peer) if address.peer else b"")
        self._ask(_DEL_ADDR, _ACK, body)

    def routes(self) -> list[Route]:
        """The routes of the main table, both families, including those that the kernel added."""
        found = (_parse_route(body) for body in self._ask(_GET_ROUTE, _DUMP, _ROUTE.pack(*[0] * 9)))
        return [route for route in found if route is not None]

    def add_route(self, route: Route, *, append: bool = False) -> None:
        """Replace a route to the same destination with the same metric, or append to it."""
        self._ask(_NEW_ROUTE, _ACK | _CREATE | (_APPEND if append else _REPLACE), _route_body(route))

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
        """The next messages that answer our request."""
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
        tx_queue_len=_number(found.get(13)),
    )


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")


def _parse_address(body: bytes) -> Address:
    _, prefix, short_flags, scope, index = _ADDRESS.unpack_from(body)
    found = _attributes(body[_ADDRESS.size :])
    address = found.get(2) or found.get(1, b"")
    peer = found.get(1, b"")
    return Address(
        index,
        address,
        prefix,
        scope,
        peer=peer if peer != address else b"",
        flags=_number(found.get(8)) or short_flags,
        metric=_number(found.get(9)),
        label=_text(found.get(3, b"")),
        broadcast=found.get(4, b""),
    )


def _address_body(address: Address) -> bytes:
    own, prefix, is_v6 = address.address, address.prefix, len(address.address) == 16
    body = _ADDRESS.pack(_family(own), prefix, 0, address.scope, address.index)
    body += attribute(2, own) + attribute(1, address.peer or own)
    broadcast = address.broadcast
    if broadcast is None and not is_v6 and prefix < 31:
        broadcast = (int.from_bytes(own, "big") | ((1 << (32 - prefix)) - 1)).to_bytes(4, "big")
    if broadcast:
        body += attribute(4, broadcast)
    flags = address.flags & IFA_F_NOPREFIXROUTE | (_IFA_F_NODAD if is_v6 else 0)
    if flags:
        body += attribute(8, _U32.pack(flags))
    if address.flags & IFA_F_DEPRECATED:
        body += attribute(6, struct.pack("=IIII", 0, _FOR_EVER, 0, 0))  # struct ifa_cacheinfo: preferred, valid
    if address.metric:
        body += attribute(9, _U32.pack(address.metric))
    if address.label:
        body += attribute(3, address.label.encode() + b"\0")
    return body


def _parse_route(body: bytes) -> Route | None:
    family, prefix, _, tos, table, protocol, scope, kind, flags = _ROUTE.unpack_from(body)
    found = _attributes(body[_ROUTE.size :])
    if kind not in CARRIED_TYPES or (_number(found.get(15)) or table) != RT_TABLE_MAIN:
        return None
    metrics = _attributes(found.get(8, b""))
    return Route(
        family,
        found.get(1, b""),
        prefix,
        index=_number(found.get(4)),
        gateway=_gateway(found),
        source=found.get(7, b""),
        scope=scope,
        flags=flags & 0x4,
        mtu=_number(metrics.get(2)),
        priority=_number(found.get(6)),
        protocol=protocol,
        type=kind,
        tos=tos,
        metrics={number: _number(value) for number, value in metrics.items() if number not in (2, 16)},
        congestion=_text(metrics.get(16, b"")),
        nexthops=tuple(_parse_nexthops(found.get(9, b""))),
        preference=(found.get(20) or b"\0")[0],
    )


def _gateway(found: dict[int, bytes]) -> bytes:
    """RTA_GATEWAY, or RTA_VIA: struct rtvia, a family and an address."""
    return found.get(5) or found.get(18, b"")[2:]


def _parse_nexthops(data: bytes) -> Iterator[NextHop]:
    while len(data) >= _NEXTHOP.size:
        length, flags, hops, index = _NEXTHOP.unpack_from(data)
        if length < _NEXTHOP.size:
            return
        yield NextHop(index, _gateway(_attributes(data[_NEXTHOP.size : length])), hops + 1, flags & 0x4)
        data = data[(length + 3) & ~3 :]


def _route_body(route: Route) -> bytes:
    body = _ROUTE.pack(
        route.family,
        route.prefix,
        0,
        route.tos,
        RT_TABLE_MAIN,
        route.protocol,
        route.scope,
        route.type,
        route.flags,
    )
    if route.dest:
        body += attribute(1, route.dest)
    if route.index:
        body += attribute(4, _U32.pack(route.index))
    if route.gateway:
        body += _gateway_attribute(route.family, route.gateway)
    if route.priority:
        body += attribute(6, _U32.pack(route.priority))
    if route.source:
        body += attribute(7, route.source)
    metrics = attribute(2, _U32.pack(route.mtu)) if route.mtu else b""
    metrics += b"".join(attribute(number, _U32.pack(value)) for number, value in sorted(route.metrics.items()))
    if route.congestion:
        metrics += attribute(16, route.congestion.encode() + b"\0")
    if metrics:
        body += attribute(8, metrics)
    if route.nexthops:
        body += attribute(9, b"".join(_nexthop_body(route.family, hop) for hop in route.nexthops))
    if route.preference:
        body += attribute(20, bytes((route.preference,)))
    return body


def _gateway_attribute(family: int, gateway: bytes) -> bytes:
    if _family(gateway) == family:
        return attribute(5, gateway)
    return attribute(18, struct.pack("=H", _family(gateway)) + gateway)


def _nexthop_body(family: int, hop: NextHop) -> bytes:
    more = _gateway_attribute(family, hop.gateway) if hop.gateway else b""
    return _NEXTHOP.pack(_NEXTHOP.size + len(more), hop.flags, hop.weight - 1, hop.index) + more
