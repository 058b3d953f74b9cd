"""Messages of rtnetlink: what is sent byte for byte, and what is read of what a kernel sent."""

import struct

from katapod.kernel.netlink import Route, _parse_address, _parse_link, _parse_route, _route_body, attribute


def test_an_attribute_is_padded_but_its_length_is_not() -> None:
    assert attribute(3, b"lo\0") == b"\x07\0\x03\0lo\0\0"
    assert attribute(1, b"abcd") == b"\x08\0\x01\0abcd"
    assert attribute(2, b"") == b"\x04\0\x02\0"


def test_a_route_is_what_it_was_after_a_round_trip() -> None:
    route = Route(
        2, bytes([10, 9, 0, 0]), 16, index=3, gateway=bytes([10, 1, 1, 1]), source=bytes([10, 1, 1, 2]),
        scope=0, flags=4, mtu=1400, priority=7,
    )  # fmt: skip
    body = _route_body(route)
    assert body[:12] == bytes([2, 16, 0, 0, 254, 4, 0, 1, 4, 0, 0, 0])
    parsed = _parse_route(body)
    assert parsed is not None
    assert vars(parsed) == vars(route)


def test_default_routes_of_both_families_differ_in_their_family() -> None:
    for family, gateway in ((2, bytes(4)), (10, bytes(16))):
        parsed = _parse_route(_route_body(Route(family, b"", 0, index=2, gateway=gateway)))
        assert parsed is not None
        assert (parsed.family, parsed.dest, parsed.gateway) == (family, b"", gateway)


def test_routes_of_other_tables_and_kinds_are_passed_over() -> None:
    body = bytearray(_route_body(Route(2, bytes(4), 32, index=1)))
    body[7] = 2  # local
    assert _parse_route(bytes(body)) is None
    elsewhere = _route_body(Route(2, bytes(4), 32, index=1)) + attribute(15, struct.pack("=I", 1000))
    assert _parse_route(elsewhere) is None


def test_links_and_addresses() -> None:
    body = struct.pack("=BxHiII", 0, 1, 5, 0x1003, 0) + attribute(3, b"eth0\0") + attribute(4, struct.pack("=I", 9000))
    link = _parse_link(body + attribute(1, bytes(range(6))) + attribute(18 | 0x8000, b"nested"))
    assert (link.index, link.name, link.mtu, link.mac, link.flags) == (5, "eth0", 9000, bytes(range(6)), 0x1003)
    more = attribute(5, struct.pack("=I", 7)) + attribute(10, struct.pack("=I", 4))
    port = _parse_link(body + more + attribute(18 | 0x8000, attribute(1, b"veth\0")))
    assert (port.peer, port.master, port.kind) == (7, 4, "veth")
    head = struct.pack("=BBBBI", 2, 24, 0, 253, 5)
    address = _parse_address(head + attribute(1, b"peer") + attribute(2, b"ours"))
    assert (address.index, address.address, address.prefix, address.scope) == (5, b"ours", 24, 253)


def test_a_broken_attribute_ends_the_reading() -> None:
    link = _parse_link(struct.pack("=BxHiII", 0, 1, 5, 0, 0) + attribute(3, b"a\0") + b"\x01\0\x04\0rest")
    assert (link.name, link.mtu) == ("a", 0)
