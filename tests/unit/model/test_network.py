"""What ip(8) says, as it said it, and what becomes of it."""

import json
from typing import Any

import pytest

from katapod.model.network import Address, Interface, InterfaceKind, Neighbour, NetworkError, NextHop, Route
from katapod.model.network_text import parse_pod_network

LINKS = b"""[{"ifindex":1,"ifname":"lo","flags":["LOOPBACK"],"mtu":65536,"qdisc":"noop","operstate":"DOWN",
"group":"default","txqlen":1000,"link_type":"loopback","address":"00:00:00:00:00:00","addr_info":[{"family":"inet",
"local":"127.0.0.1","prefixlen":8,"scope":"host"}]},{"ifindex":3,"link":"p0","ifname":"eth0",
"flags":["BROADCAST","MULTICAST","UP","LOWER_UP"],"mtu":1500,"qdisc":"noqueue","link_type":"ether",
"address":"d6:23:52:80:43:97","broadcast":"ff:ff:ff:ff:ff:ff","linkinfo":{"info_kind":"veth"},"num_tx_queues":2,
"addr_info":[{"family":"inet","local":"10.1.1.2","prefixlen":24,"scope":"global","label":"eth0",
"valid_life_time":4294967295},{"family":"inet6","local":"fd00::2","prefixlen":64,"scope":"global","nodad":true},
{"family":"inet6","local":"fe80::d423:52ff:fe80:4397","prefixlen":64,"scope":"link","tentative":true}]}]"""
ROUTES = b"""[{"type":"unicast","dst":"default","gateway":"10.1.1.1","dev":"eth0","table":"main","protocol":"boot",
"scope":"global","flags":[]},{"type":"unicast","dst":"10.1.1.0/24","dev":"eth0","table":"main","protocol":"kernel",
"scope":"link","prefsrc":"10.1.1.2","flags":[]},{"type":"unicast","dst":"10.9.0.0/16","gateway":"10.200.0.1",
"dev":"eth0","table":"main","protocol":"boot","scope":"global","flags":["onlink"],"metrics":[{"mtu":1400}]},
{"type":"local","dst":"10.1.1.2","dev":"eth0","table":"local","protocol":"kernel","scope":"host"},
{"type":"unicast","dst":"fd00::/64","dev":"eth0","table":"main","protocol":"kernel","metric":256,"pref":"medium"},
{"type":"unicast","dst":"fe80::/64","dev":"p0","table":"main","protocol":"kernel","metric":256,"pref":"medium"},
{"type":"unicast","dst":"default","gateway":"fd00::1","dev":"eth0","table":"main","protocol":"boot","scope":"global",
"metric":1024,"flags":[],"pref":"medium"},
{"type":"unicast","dst":"169.254.1.1","dev":"eth0","table":"main","protocol":"boot","scope":"link","flags":[]}]"""
NEIGHBOURS = b"""[{"dst":"10.1.1.1","dev":"eth0","lladdr":"02:00:00:00:00:01","state":["REACHABLE"]},
{"dst":"10.1.1.9","dev":"eth0","lladdr":"02:00:00:00:00:09","state":["REACHABLE"]},
{"dst":"10.1.1.7","dev":"eth0","lladdr":"02:00:00:00:00:07","state":["PERMANENT"]},
{"dst":"10.1.1.8","dev":"eth0","state":["FAILED"]}]"""


def parse_interfaces(links: bytes, routes: bytes, neighbours: bytes) -> tuple[Interface, ...]:
    return parse_pod_network(links, routes, neighbours).interfaces


def one(**changes: Any) -> bytes:
    link: dict[str, Any] = json.loads(LINKS)[1]
    return json.dumps([link | changes]).encode()


def test_a_veth_with_both_families() -> None:
    (eth0,) = parse_interfaces(LINKS, ROUTES, NEIGHBOURS)
    assert (eth0.index, eth0.name, eth0.kind, eth0.mtu) == (3, "eth0", InterfaceKind.VETH, 1500)
    assert eth0.mac == "d6:23:52:80:43:97"
    assert eth0.addresses == (
        Address("10.1.1.2", 24),
        Address("fd00::2", 64),
        Address("fe80::d423:52ff:fe80:4397", 64, scope=253),
    )
    assert eth0.routes == (
        Route("", is_v6=False, gateway="10.1.1.1", protocol=3),
        Route("10.9.0.0/16", is_v6=False, gateway="10.200.0.1", flags=4, mtu=1400, protocol=3),
        Route("169.254.1.1", is_v6=False, scope=253, protocol=3),
        Route("", is_v6=True, gateway="fd00::1", metric=1024, protocol=3),
    )
    assert eth0.neighbours == (
        Neighbour("10.1.1.1", "02:00:00:00:00:01"),
        Neighbour("10.1.1.7", "02:00:00:00:00:07"),
    )


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"linkinfo": {"info_kind": "macvlan", "info_data": {"mode": "bridge"}}}, InterfaceKind.MACVLAN),
        ({"linkinfo": {"info_kind": "ipvlan", "info_data": {"mode": "l2", "bridge": True}}}, InterfaceKind.IPVLAN),
        (
            {"linkinfo": {"info_kind": "ipvlan", "info_data": {"mode": "l3"}}, "flags": ["NOARP", "UP"]},
            InterfaceKind.IPVLAN,
        ),
        ({"linkinfo": {}}, InterfaceKind.DEVICE),
        ({"linkinfo": {"info_kind": "tun", "info_data": {"type": "tap", "multi_queue": True}}}, InterfaceKind.TAP),
    ],
)
def test_kinds(changes: dict[str, Any], kind: InterfaceKind) -> None:
    (interface,) = parse_interfaces(one(**changes), b"[]", b"[]")
    assert interface.kind is kind
    assert bool(interface.flags & 0x80) == ("NOARP" in changes.get("flags", ()))
    assert interface.multi_queue == (kind is InterfaceKind.TAP)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"linkinfo": {"info_kind": "dummy"}}, "eth0.*dummy"),
        ({"linkinfo": {"info_kind": "netkit"}}, "eth0.*netkit"),
        ({"linkinfo": {"info_kind": "ipvlan", "info_data": {"mode": "l3s", "bridge": True}}}, "eth0.*ipvlan.*l3s"),
        ({"linkinfo": {"info_kind": "tun", "info_data": {"type": "tun"}}}, "eth0.*tun in IP mode"),
        ({"linkinfo": {"info_kind": "sit"}, "link_type": "sit"}, "eth0.*sit"),
    ],
)
def test_other_kinds_are_an_error_with_their_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(NetworkError, match=words):
        parse_interfaces(one(**changes), b"[]", b"[]")


def test_what_has_no_address_is_left_out() -> None:
    assert parse_interfaces(one(addr_info=[], linkinfo={"info_kind": "sit"}), b"[]", b"[]") == ()
    assert parse_interfaces(b"[]", b"", b"") == ()


@pytest.mark.parametrize("data", [b"{", b'{"a":1}', b'[{"ifindex":"x"}]', b"\xff"])
def test_what_is_no_answer_is_an_error(data: bytes) -> None:
    with pytest.raises(NetworkError, match="what is not understood"):
        parse_interfaces(data, b"[]", b"[]")


def routes(*found: dict[str, Any]) -> bytes:
    common = {"type": "unicast", "table": "main", "protocol": "boot", "scope": "global", "flags": []}
    return json.dumps([common | each for each in found]).encode()


def test_routes_that_belong_to_no_single_interface() -> None:
    hops = [
        {"gateway": "10.1.1.1", "dev": "eth0", "weight": 1, "flags": []},
        {"gateway": "10.1.1.9", "dev": "eth0", "weight": 2, "flags": ["onlink"]},
    ]
    found = parse_pod_network(
        one(),
        routes(
            {"dst": "default", "nexthops": hops},
            {"type": "blackhole", "dst": "10.66.0.0/16", "metric": 5},
            {"type": "unreachable", "dst": "fd66::/64", "dev": "lo", "metric": 1024, "error": -113, "pref": "medium"},
            {"dst": "10.5.0.0/16", "dev": "lo", "scope": "link"},
        ),
        b"[]",
    )
    assert found.lost == ()
    assert found.routes == (
        Route("", is_v6=False, protocol=3, nexthops=(NextHop("eth0", "10.1.1.1"), NextHop("eth0", "10.1.1.9", 2, 4))),
        Route("10.5.0.0/16", is_v6=False, protocol=3, scope=253, device="lo"),
        Route("10.66.0.0/16", is_v6=False, protocol=3, type=6, metric=5),
        Route("fd66::/64", is_v6=True, protocol=3, type=7, metric=1024),
    )


def test_what_a_route_has_beside_its_way() -> None:
    metrics = {"mtu": 1300, "rtt": 300, "advmss": 900, "ecn": None, "quickack": 1, "congestion": "cubic"}
    found = parse_pod_network(
        one(),
        routes(
            {"dst": "10.31.0.0/16", "tos": "0x10", "gateway": "10.1.1.1", "dev": "eth0", "metrics": [metrics]},
            {"dst": "10.30.0.0/16", "via": {"family": "inet6", "host": "fe80::1"}, "dev": "eth0"},
            {"dst": "fd44::/64", "gateway": "fe80::5", "dev": "eth0", "metric": 9, "pref": "high", "protocol": "186"},
        ),
        b"[]",
    )
    (eth0,) = found.interfaces
    first, second, third = eth0.routes
    assert (first.tos, first.mtu, first.congestion) == (16, 1300, "cubic")
    assert first.metrics == ((4, 2400), (8, 900), (12, 1), (15, 1))
    assert (second.gateway, second.is_v6) == ("fe80::1", False)
    assert (third.preference, third.protocol, third.metric) == (1, 186, 9)


@pytest.mark.parametrize(
    ("route", "words"),
    [
        ({"dst": "10.2.0.0/16", "dev": "eth0", "table": "100"}, "the routes of table 100"),
        ({"type": "local", "dst": "10.2.0.0/16", "dev": "lo", "table": "local"}, "the routes of table local"),
        ({"dst": "10.2.0.0/16", "dev": "tunl0"}, "the route 10.2.0.0/16 by tunl0, which the guest does not have"),
        ({"dst": "10.2.0.0/16", "dev": "eth0", "encap": "mpls"}, "encap of the route 10.2.0.0/16"),
        ({"dst": "fd02::/64", "from": "fd01::/64", "dev": "eth0", "pref": "low"}, "from of the route fd02::/64"),
        ({"type": "nat", "dst": "10.2.0.0/16"}, "the route nat 10.2.0.0/16"),
        ({"dst": "10.2.0.0/16", "dev": "eth0", "metrics": [{"new": 1}]}, "new of the route 10.2.0.0/16"),
    ],
)
def test_what_cannot_be_carried_is_named(route: dict[str, Any], words: str) -> None:
    assert parse_pod_network(one(), routes(route), b"[]").lost == (words,)
    by_kernel = {"protocol": "kernel"} if "table" in route or "dev" in route else {}
    if by_kernel:
        assert parse_pod_network(one(), routes(route | by_kernel), b"[]").lost == ()


def test_addresses() -> None:
    info = [
        {"local": "10.9.0.2", "address": "10.9.5.5", "prefixlen": 32, "label": "eth0:x", "metric": 7},
        {"local": "10.8.0.2", "prefixlen": 24, "noprefixroute": True, "broadcast": "10.8.0.255", "label": "eth0"},
        {"local": "10.7.0.2", "prefixlen": 24, "scope": "host"},
        {"local": "10.6.0.2", "prefixlen": 32},
        {"local": "fd00::3", "prefixlen": 64, "deprecated": True, "preferred_life_time": 0},
    ]
    made = routes(
        {"dst": "10.9.5.5", "dev": "eth0", "protocol": "kernel"},
        {"dst": "fd00::/64", "dev": "eth0", "protocol": "kernel", "pref": "medium"},
    )
    (eth0,) = parse_interfaces(one(addr_info=info, txqlen=500), made, b"[]")
    assert eth0.addresses == (
        Address("10.9.0.2", 32, peer="10.9.5.5", label="eth0:x", metric=7),
        Address("10.8.0.2", 24, flags=0x200, broadcast="10.8.0.255"),
        Address("10.7.0.2", 24, flags=0x200, scope=254),  # its route has been deleted
        Address("10.6.0.2", 32),
        Address("fd00::3", 64, flags=0x20),
    )
    assert (eth0.flags & 1, eth0.tx_queue_len, eth0.no_link_local) == (1, 500, False)
    (down,) = parse_interfaces(one(flags=["BROADCAST", "MULTICAST"], addr_info=info[2:3]), b"[]", b"[]")
    assert (down.flags & 1, down.addresses[0].flags) == (0, 0)
    (only4,) = parse_interfaces(one(addr_info=info[2:3]), b"[]", b"[]")
    assert only4.no_link_local
