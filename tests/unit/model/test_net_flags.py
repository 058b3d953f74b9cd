"""The flags of networks: what they mean and what is refused."""

import pytest

from katapod.model.errors import UsageError
from katapod.model.net_flags import (
    PortRequest,
    parse_add_host,
    parse_dns,
    parse_mac,
    parse_network,
    parse_publish,
)


def port(container: int, first: int = 0, last: int | None = None, ip: str = "", protocol: str = "tcp") -> PortRequest:
    last = first if last is None else last
    return PortRequest(container_port=container, host_first=first, host_last=last, host_ip=ip, protocol=protocol)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("8080:80", [port(80, 8080)]),
        ("80", [port(80)]),
        ("53:53/udp", [port(53, 53, protocol="udp")]),
        ("127.0.0.1:8080:80", [port(80, 8080, ip="127.0.0.1")]),
        ("127.0.0.1::80", [port(80, ip="127.0.0.1")]),
        ("0.0.0.0:8080:80", [port(80, 8080)]),
        ("[::1]:8080:80/TCP", [port(80, 8080, ip="::1")]),
        ("[::1]:80", [port(80, ip="::1")]),
        ("8000-8001:80-81", [port(80, 8000), port(81, 8001)]),
        ("8000-8010:80", [port(80, 8000, 8010)]),
        ("80-81", [port(80), port(81)]),
    ],
)
def test_publish(text: str, wanted: list[PortRequest]) -> None:
    assert list(parse_publish(text)) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "80:",
        "x:80",
        "70000:80",
        "80:0",
        "90-80:1",
        "80-82:1-2",
        "1:2:3:4",
        "300.1.1.1:80:80",
        "[::1]80:80",
        "80:80/sctp",
        "80:80/",
        "-1:80",
        "\uff18\uff10:80",
        "[::1:80:80",
    ],
)
def test_publish_refuses(text: str) -> None:
    with pytest.raises(UsageError, match="cannot use -p"):
        parse_publish(text)


def test_add_host() -> None:
    assert parse_add_host("db:10.1.2.3") == ("db", "10.1.2.3")
    assert parse_add_host("db=fd00::1") == ("db", "fd00::1")
    assert parse_add_host("db:fd00::1") == ("db", "fd00::1")
    assert parse_add_host("me.local:host-gateway") == ("me.local", "host-gateway")
    for text in ("db", "db:", ":1.2.3.4", "d b:1.2.3.4", "db:1.2.3.4\n5.6.7.8 x", "db:nowhere"):
        with pytest.raises(UsageError, match="cannot use --add-host"):
            parse_add_host(text)


def test_names_of_networks() -> None:
    assert [parse_network(name) for name in ("none", "bridge", "my.net-1")] == ["none", "bridge", "my.net-1"]
    for text, word in (
        ("host", "kernel of its own"),
        ("container:x", "another"),
        ("a/b", "not a network name"),
        ("", "not a network name"),
    ):
        with pytest.raises(UsageError, match=word):
            parse_network(text)


def test_addresses() -> None:
    assert parse_dns("192.0.2.53") == "192.0.2.53"
    assert parse_mac("02-42-AC-11-00-02") == "02:42:ac:11:00:02"
    for text in ("03:00:00:00:00:01", "02:00:00:00:00", "zz:00:00:00:00:01"):
        with pytest.raises(UsageError, match="--mac-address"):
            parse_mac(text)
    with pytest.raises(UsageError, match="--dns"):
        parse_dns("dns.example")
