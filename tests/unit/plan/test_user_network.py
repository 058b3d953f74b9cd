"""Networks of `network create`: what is asked for, and the list of plugins that it becomes."""

import json
from pathlib import Path

import pytest

from katapod.host.network_files import is_ours, network_file, remove_network_file, subnet_of, write_network_file
from katapod.model.cni import parse_network
from katapod.model.errors import AlreadyExists, KatapodError, UsageError
from katapod.plan.user_network import NetworkWish, bridge_device, check_wish, plan_user_network


def test_a_network_of_its_own() -> None:
    wish = NetworkWish(name="app", labels={"a": "b"})
    check_wish(wish)
    document = plan_user_network(wish, "10.20.0.0/24")
    network = parse_network(json.dumps(document).encode(), "x")
    assert (network.name, [plugin.type for plugin in network.plugins]) == ("app", ["bridge", "portmap", "firewall"])
    assert network.takes("portMappings")
    assert subnet_of(network) == "10.20.0.0/24"
    bridge = document["plugins"][0]
    assert (bridge["isGateway"], bridge["ipMasq"], len(bridge["bridge"])) == (True, True, 15)
    assert bridge["ipam"]["ranges"] == [[{"subnet": "10.20.0.0/24", "gateway": "10.20.0.1"}]]


def test_an_internal_one_has_no_way_out() -> None:
    wish = NetworkWish(name="app", internal=True, mtu=1400, subnet="10.20.0.0/24", gateway="10.20.0.9")
    check_wish(wish)
    document = plan_user_network(wish, "10.20.0.0/24")
    bridge = document["plugins"][0]
    assert (bridge["isGateway"], bridge["ipMasq"], bridge["ipam"]["routes"], bridge["mtu"]) == (False, False, [], 1400)
    assert [plugin["type"] for plugin in document["plugins"]] == ["bridge", "firewall"]
    assert bridge["ipam"]["ranges"][0][0]["gateway"] == "10.20.0.9"


@pytest.mark.parametrize(
    ("part", "first", "last"),
    [
        ("10.20.0.0/24", "10.20.0.1", "10.20.0.254"),
        ("10.20.0.0/26", "10.20.0.1", "10.20.0.63"),
        ("10.20.0.64/26", "10.20.0.64", "10.20.0.127"),
        ("10.20.0.192/26", "10.20.0.192", "10.20.0.254"),
        ("10.20.0.7/32", "10.20.0.7", "10.20.0.7"),
    ],
)
def test_a_part_of_the_addresses(part: str, first: str, last: str) -> None:
    wish = NetworkWish(name="app", subnet="10.20.0.0/24", ip_range=part)
    check_wish(wish)
    found = plan_user_network(wish, wish.subnet)["plugins"][0]["ipam"]["ranges"][0][0]
    assert (found["rangeStart"], found["rangeEnd"]) == (first, last)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"subnet": "10.20.0.1/24"}, "--subnet"),
        ({"subnet": "fd00::/64"}, "none of IPv4"),
        ({"subnet": "10.20.0.0/31"}, "no room"),
        ({"subnet": "x"}, "it is no network"),
        ({"gateway": "10.20.0.1"}, "it needs --subnet"),
        ({"subnet": "10.20.0.0/24", "gateway": "10.21.0.1"}, "it is no address of"),
        ({"subnet": "10.20.0.0/24", "gateway": "10.20.0.255"}, "it is no address of"),
        ({"subnet": "10.20.0.0/24", "gateway": "y"}, "no IPv4 address"),
        ({"subnet": "10.20.0.0/24", "ip_range": "10.21.0.0/25"}, "it is not within"),
        ({"mtu": 100}, "mtu=100"),
    ],
)
def test_what_cannot_be(changes: dict[str, str | int], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        check_wish(NetworkWish(name="app", **changes))  # type: ignore[arg-type]


def test_devices_differ() -> None:
    assert bridge_device("a") != bridge_device("b")
    assert len(bridge_device("x" * 128)) == 15


async def test_its_file(tmp_path: Path) -> None:
    directory = tmp_path / "net.d"
    document = plan_user_network(NetworkWish(name="app"), "10.20.0.0/24")
    path = write_network_file(directory, "app", document)
    assert (path, list(directory.iterdir())) == (network_file(directory, "app"), [path])
    assert is_ours(parse_network(path.read_bytes(), str(path)))
    assert not is_ours(parse_network(path.read_bytes(), str(directory / "app.conflist")))
    with pytest.raises(AlreadyExists, match="there is one of that name"):
        write_network_file(directory, "app", document)
    (tmp_path / "file").touch()
    with pytest.raises(KatapodError, match="cannot write"):
        write_network_file(tmp_path / "file", "app", document)
    await remove_network_file(path, "no-such-bridge")
    await remove_network_file(path, "no-such-bridge")
    assert list(directory.iterdir()) == []
