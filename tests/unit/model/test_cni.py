"""CNI's documents: what is kept, what is passed on, what is refused."""

import json
from typing import Any

import pytest

from katapod.model.cni import CniError, parse_error, parse_network, parse_result
from katapod.model.errors import ConfigError, KatapodError

BRIDGE = {
    "type": "bridge",
    "bridge": "br0",
    "ipam": {"type": "host-local"},
    "capabilities": {"ips": True, "mac": False},
}


def network(**changes: Any) -> bytes:
    return json.dumps({"cniVersion": "1.0.0", "name": "web", "plugins": [BRIDGE], **changes}).encode()


def test_a_list_keeps_what_its_plugins_alone_know() -> None:
    found = parse_network(network(plugins=[BRIDGE, {"type": "tuning", "x": [1]}], disableCheck=True), "f.conflist")
    assert (found.name, found.cni_version, found.disable_check, found.source) == ("web", "1.0.0", True, "f.conflist")
    assert [plugin.type for plugin in found.plugins] == ["bridge", "tuning"]
    assert found.plugins[0].settings == {"bridge": "br0", "ipam": {"type": "host-local"}}
    assert found.plugins[0].capabilities == ("ips",)
    assert found.plugins[1].settings == {"x": [1]}
    assert found.takes("ips")
    assert not found.takes("mac")


def test_a_single_configuration_is_a_list_of_one() -> None:
    found = parse_network(json.dumps({"cniVersion": "0.3.1", "name": "old", **BRIDGE}).encode(), "old.conf")
    assert [plugin.settings for plugin in found.plugins] == [{"bridge": "br0", "ipam": {"type": "host-local"}}]


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"{", "JSON"),
        (b"[]", "object"),
        (b"[" * 100_000, "JSON"),
        (b" " * (2 << 20), "larger"),
        (network(name="a/b"), "name"),
        (network(name=None), "name"),
        (network(plugins=[]), "no plugins"),
        (network(plugins=["bridge"]), "type"),
        (network(plugins=[{"type": "../bridge"}]), "type"),
        (network(plugins=[{"type": ".."}]), "type"),
        (network(plugins=[{"type": "x", "capabilities": []}]), "capabilities"),
        (network(cniVersion="0.2.0"), "0.2.0"),
        (network(cniVersion=None), "cniVersion"),
        (json.dumps({"cniVersion": "1.0.0", "name": "x", **BRIDGE}).encode(), "lists"),
    ],
)
def test_what_is_no_network_is_refused_by_name(data: bytes, word: str) -> None:
    with pytest.raises(ConfigError, match=word) as caught:
        parse_network(data, "net.conflist")
    assert "net.conflist" in str(caught.value)


def test_of_several_versions_one_that_is_known_is_taken() -> None:
    assert parse_network(network(cniVersions=["1.0.0", "9.0.0"], cniVersion="9.0.0"), "x").cni_version == "1.0.0"


RESULT: dict[str, Any] = {
    "interfaces": [{"name": "kata0"}, {"name": "eth0", "mac": "02:00:00:00:00:01", "sandbox": "/run/netns/x"}],
    "ips": [{"address": "10.1.2.3/16", "gateway": "10.1.0.1", "interface": 1}],
    "routes": [{"dst": "0.0.0.0/0"}],
    "dns": {"nameservers": ["10.1.0.53"]},
}


@pytest.mark.parametrize("version", ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"])
def test_results_of_all_versions(version: str) -> None:
    document = {"cniVersion": version, **RESULT}
    if version < "1":
        document["ips"] = [{"version": "4", "address": "10.1.2.3/16", "gateway": "10.1.0.1", "interface": 1}]
    found = parse_result(json.dumps(document).encode(), "bridge")
    assert [one.ip for one in found.addresses("eth0")] == ["10.1.2.3"]
    assert found.addresses("eth0")[0].gateway == "10.1.0.1"
    assert found.addresses("kata0") == ()
    assert found.dns.nameservers == ("10.1.0.53",)
    assert found.document == document


@pytest.mark.parametrize(
    "data",
    [b"", b"null", b'{"ips": 3}', b'{"ips": [{"address": "nonsense"}]}', b'{"interfaces": [{"name": 1}]}'],
)
def test_what_is_no_result_is_refused(data: bytes) -> None:
    with pytest.raises(KatapodError, match="cannot understand the result of bridge"):
        parse_result(data, "bridge")


def test_an_address_of_an_interface_that_is_not_there_is_nobodys() -> None:
    found = parse_result(b'{"ips": [{"address": "10.1.2.3/16", "interface": 7}]}', "bridge")
    assert found.addresses("eth0") == ()


def test_errors() -> None:
    found = parse_error(b'{"cniVersion": "1.0.0", "code": 11, "msg": "try again", "details": "busy"}')
    assert found == CniError(code=11, msg="try again", details="busy")
    assert str(found) == "try again: busy (code 11)"
    assert parse_error(b"panic: nil") is None
    assert parse_error(b'{"msg": "no code"}') is None
