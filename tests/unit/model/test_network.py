"""What ip(8) says, as it said it, and what becomes of it."""

import json
from typing import Any

import pytest

from katapod.model.network import Address, InterfaceKind, Neighbour, NetworkError, Route, parse_interfaces

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
{"type":"unicast","dst":"fe80::/64","dev":"p0","table":"main","protocol":"kernel","metric":256,"pref":"medium"},
{"type":"unicast","dst":"default","gateway":"fd00::1","dev":"eth0","table":"main","protocol":"boot","scope":"global",
"metric":1024,"flags":[],"pref":"medium"},
{"type":"unicast","dst":"169.254.1.1","dev":"eth0","table":"main","protocol":"boot","scope":"link","flags":[]}]"""
NEIGHBOURS = b"""[{"dst":"10.1.1.1","dev":"eth0","lladdr":"02:00:00:00:00:01","state":["REACHABLE"]},
{"dst":"10.1.1.9","dev":"eth0","lladdr":"02:00:00:00:00:09","state":["REACHABLE"]},
{"dst":"10.1.1.7","dev":"eth0","lladdr":"02:00:00:00:00:07","state":["PERMANENT"]},
{"dst":"10.1.1.8","dev":"eth0","state":["FAILED"]}]"""


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
        Address("fe80::d423:52ff:fe80:4397", 64),
    )
    assert eth0.routes == (
        Route("", is_v6=False, gateway="10.1.1.1"),
        Route("10.9.0.0/16", is_v6=False, gateway="10.200.0.1", flags=4, mtu=1400),
        Route("169.254.1.1", is_v6=False, scope=253),
        Route("", is_v6=True, gateway="fd00::1"),
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
    assert interface.noarp == ("NOARP" in changes.get("flags", ()))
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
