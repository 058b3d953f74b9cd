"""What ip(8) and tc(8) say of a namespace, parsed."""

import json

from katapod.observe.netns_facts import parse_links, parse_redirects, parse_routes

FILTERS = [
    {"parent": "ffff:", "kind": "u32", "chain": 0},
    {"parent": "ffff:", "kind": "u32", "options": {"fh": "800:", "ht_divisor": 1}},
    {
        "kind": "u32",
        "options": {
            "match": {"value": "0", "mask": "0", "offmask": "", "off": 0},
            "actions": [
                {
                    "kind": "mirred",
                    "mirred_action": "redirect",
                    "to_dev": "tap0_kata",
                    "stats": {"bytes": 936, "packets": 15, "drops": 1},
                }
            ],
        },
    },
]


def test_redirects() -> None:
    (found,) = parse_redirects("eth0", json.dumps(FILTERS))
    assert (found.source, found.target, found.match) == ("eth0", "tap0_kata", "everything")
    assert (found.packets, found.bytes, found.dropped) == (15, 936, 1)
    assert parse_redirects("eth0", "[]") == []


def test_links() -> None:
    side = {"bytes": 1, "packets": 2, "dropped": 3}
    text = [
        {
            "ifindex": 2,
            "ifname": "eth0",
            "link_index": 7,
            "link_netnsid": 0,
            "flags": ["UP"],
            "mtu": 1500,
            "address": "0a:58:0a:fe:01:1a",
            "linkinfo": {"info_kind": "veth"},
            "addr_info": [{"local": "10.0.0.2", "prefixlen": 24}],
            "stats64": {"rx": side, "tx": side},
        }
    ]
    (link,) = parse_links(json.dumps(text).encode())
    assert (link.name, link.peer_index, link.kind, link.up) == ("eth0", 7, "veth", True)
    assert link.addresses == ("10.0.0.2/24",)
    assert (link.counters.rx_packets, link.counters.tx_dropped) == (2, 3)


def test_routes() -> None:
    text = [
        {"dst": "default", "gateway": "10.0.0.1", "dev": "eth0", "flags": []},
        {"type": "local", "dst": "10.0.0.2", "dev": "eth0", "table": "local"},
        {"dst": "10.0.0.0/24", "dev": "eth0", "prefsrc": "10.0.0.2", "metric": 100},
    ]
    assert parse_routes(json.dumps(text).encode()) == [
        "default via 10.0.0.1 dev eth0",
        "10.0.0.0/24 dev eth0 src 10.0.0.2 metric 100",
    ]
