"""What plugins are asked, and the files that say what came of it."""

import json

import msgspec
import pytest

from katapod.model.attachment import AttachmentRecord, PublishedPort
from katapod.model.cni import CniDns, CniResult, NetworkConfig, PluginConfig, parse_result
from katapod.model.errors import HostLacks, UsageError
from katapod.model.record import SandboxRecord
from katapod.plan.attachment import (
    attachment_of,
    check_capabilities,
    hosts_file,
    resolv_conf,
    result_of,
    with_result,
)
from katapod.plan.bridge import choose_subnet, plan_bridge
from katapod.plan.cni import Attachment, plan_add, plan_check, plan_delete

RESULT = parse_result(
    b'{"cniVersion": "1.0.0", "interfaces": [{"name": "eth0", "sandbox": "/run/netns/kata-a"}],'
    b' "ips": [{"address": "10.1.0.2/16", "gateway": "10.1.0.1", "interface": 0}]}',
    "bridge",
)


def record(config: NetworkConfig | None = None) -> AttachmentRecord:
    return AttachmentRecord(
        config=config or plan_bridge("10.1.0.0/16", firewall=True, publish=True),
        netns="/run/netns/kata-a",
        plugin_dirs=("/opt/cni/bin", "/usr/lib/cni"),
        host_netns="4:1",
        ports=(PublishedPort(8080, 80), PublishedPort(53, 53, "udp", "127.0.0.1")),
    )


def attachment() -> Attachment:
    return attachment_of(record(), "a")


def test_add_goes_through_the_plugins_in_order() -> None:
    steps = plan_add(attachment())
    assert [step.plugin for step in steps] == ["bridge", "portmap", "firewall"]
    assert steps[0].environment == {
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": "a",
        "CNI_NETNS": "/run/netns/kata-a",
        "CNI_IFNAME": "eth0",
        "CNI_PATH": "/opt/cni/bin:/usr/lib/cni",
        "CNI_ARGS": "IgnoreUnknown=1",
    }
    first = json.loads(steps[0].stdin())
    assert (first["cniVersion"], first["name"], first["type"], first["bridge"]) == (
        "1.0.0",
        "bridge",
        "bridge",
        "kata0",
    )
    assert "prevResult" not in first
    assert "capabilities" not in first  # the specification has them removed
    assert "runtimeConfig" not in first
    second = json.loads(steps[1].stdin(RESULT))
    assert second["prevResult"] == RESULT.document
    assert second["runtimeConfig"] == {
        "portMappings": [
            {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
            {"hostPort": 53, "containerPort": 53, "protocol": "udp", "hostIP": "127.0.0.1"},
        ]
    }
    assert "CNI_COMMAND=ADD" in steps[1].describe()


def test_delete_goes_back_with_the_last_result() -> None:
    steps = plan_delete(attachment(), RESULT)
    assert [(step.plugin, step.command) for step in steps] == [
        ("firewall", "DEL"),
        ("portmap", "DEL"),
        ("bridge", "DEL"),
    ]
    assert all(json.loads(step.stdin())["prevResult"] == RESULT.document for step in steps)
    assert all("prevResult" not in json.loads(step.stdin()) for step in plan_delete(attachment(), None))


def test_older_versions_know_no_check_and_no_result_for_delete() -> None:
    old = NetworkConfig(name="n", cni_version="0.3.1", plugins=(PluginConfig("bridge"),))
    step = plan_delete(attachment_of(record(old), "a"), RESULT)[0]
    assert "prevResult" not in json.loads(step.stdin())
    assert plan_check(attachment_of(record(old), "a"), RESULT) == ()
    assert [step.command for step in plan_check(attachment(), RESULT)] == ["CHECK"] * 3


def test_what_no_plugin_can_do_is_refused() -> None:
    plain = NetworkConfig(name="n", cni_version="1.0.0", plugins=(PluginConfig("bridge"),), source="/etc/n.conflist")
    with pytest.raises(UsageError, match="publish ports on network n"):
        check_capabilities(record(plain))
    check_capabilities(record())


def test_a_record_survives_the_disk() -> None:
    known = with_result(record(), RESULT)
    assert (known.addresses, known.gateway) == (("10.1.0.2",), "10.1.0.1")
    whole = SandboxRecord("a", 0.0, 1, "b", attachment=known)
    again = msgspec.json.decode(msgspec.json.encode(whole), type=SandboxRecord)
    assert again == whole
    assert again.attachment is not None
    assert result_of(again.attachment) == RESULT
    assert result_of(record()) is None


def test_the_subnet_keeps_out_of_the_hosts_way() -> None:
    assert choose_subnet([]) == "10.186.0.0/16"
    assert choose_subnet(["10.186.3.4", "10.187.128.0/17", "192.0.2.0/24", "fd00::/8"]) == "10.188.0.0/16"
    assert choose_subnet(["10.0.0.0/8"]) == "172.28.0.0/16"
    with pytest.raises(HostLacks, match="all private subnets"):
        choose_subnet(["0.0.0.0/1", "128.0.0.0/1"])


def test_plugins_without_work_are_left_out() -> None:
    assert [p.type for p in plan_bridge("10.1.0.0/16", firewall=False, publish=False).plugins] == ["bridge"]


def test_hosts() -> None:
    text = hosts_file("web", ("10.1.0.2", "fd00::2"), (("db", "10.9.9.9"), ("me", "host-gateway")), "10.1.0.1")
    assert text.splitlines() == [
        "127.0.0.1\tlocalhost",
        "::1\tlocalhost ip6-localhost ip6-loopback",
        "10.1.0.2\tweb",
        "fd00::2\tweb",
        "10.9.9.9\tdb",
        "10.1.0.1\tme",
    ]
    assert "127.0.1.1\tweb" in hosts_file("web", (), ())
    with pytest.raises(UsageError, match="no gateway"):
        hosts_file("web", (), (("me", "host-gateway"),))


HOST = "# comment\nsearch example.org\nnameserver 127.0.0.53\nnameserver 192.0.2.1\nnameserver ::1\noptions edns0\n"


@pytest.mark.parametrize(
    ("asked", "network", "servers", "rest"),
    [
        ((), CniDns(), ["192.0.2.1"], ["search example.org", "options edns0"]),
        (
            ("198.51.100.1",),
            CniDns(nameservers=("10.1.0.53",)),
            ["198.51.100.1"],
            ["search example.org", "options edns0"],
        ),
        ((), CniDns(nameservers=("10.1.0.53",), domain="a.b"), ["10.1.0.53"], ["search a.b"]),
    ],
)
def test_resolv_conf(asked: tuple[str, ...], network: CniDns, servers: list[str], rest: list[str]) -> None:
    lines = resolv_conf(HOST, asked, network).splitlines()
    assert lines == [*rest, *(f"nameserver {server}" for server in servers)]


def test_no_result_has_no_addresses() -> None:
    assert with_result(record(), CniResult()).addresses == ()
