"""Configurations of a node's runtime handlers: what they are made of, and that they go without a trace."""

from pathlib import Path

import msgspec
import pytest

from katapod.model.config import load_config
from katapod.operator.handlers import HandlerSpec, NodeSettings, default_settings
from katapod.operator.node.errors import NodeError
from katapod.operator.node.handler_files import config_of, planned_files, read_files, write_files
from katapod.operator.node.host import Host
from katapod.operator.node.main import parse_settings
from katapod.operator.node.payload import payloads

BIG = HandlerSpec("kata-big", ("[hypervisor.qemu]\ndefault_memory = 1024\n", "[hypervisor.qemu]\ndefault_vcpus = 3\n"))


@pytest.fixture
def host(tmp_path: Path) -> Host:
    (tmp_path / "opt/katapod/1").mkdir(parents=True)
    return Host(tmp_path)


def test_a_handler_without_drop_ins_has_the_nodes_configuration(host: Host) -> None:
    assert config_of(HandlerSpec("kata")) == ""
    assert planned_files(host, "1", [HandlerSpec("kata")]) == {}


def test_drop_ins_go_before_what_the_node_has(host: Host) -> None:
    host.write("/etc/kata-containers/configuration.toml", "[hypervisor.qemu]\ndefault_memory = 300\nmemory_slots = 7\n")
    host.write("/etc/kata-containers/config.d/50-site.toml", "[hypervisor.qemu]\ndefault_vcpus = 2\n[runtime]\n")
    host.write("/etc/kata-containers/config.d/60-site.toml", "[hypervisor.qemu]\ndefault_maxvcpus = 4\n")
    write_files(host, planned_files(host, "1", [BIG]))
    qemu = load_config(host.path(config_of(BIG))).config.qemu
    assert (qemu.default_memory, qemu.default_vcpus) == (1024, 3)
    assert (qemu.memory_slots, qemu.default_maxvcpus) == (7, 4)


def test_without_a_file_of_the_nodes_the_payloads_counts(host: Host) -> None:
    shared = "/opt/katapod/1/rootfs/usr/share/kata-containers/defaults/configuration.toml"
    host.write(shared, "[hypervisor.qemu]\nmemory_slots = 9\n")
    write_files(host, planned_files(host, "1", [BIG]))
    assert load_config(host.path(config_of(BIG))).config.qemu.memory_slots == 9


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[hypervisor.qemu]\ndefault_memroy = 1\n", r"\[hypervisor.qemu\] default_memroy: unknown key; did you mean"),
        ("[hypervisor.qemu]\ndefault_memory = 'much'\n", r"\[hypervisor.qemu\] default_memory: expected int"),
        ("[hypervisor", "not TOML"),
    ],
)
def test_what_cannot_be_used_is_said_with_its_key(host: Host, text: str, why: str) -> None:
    with pytest.raises(NodeError, match=f"kata-big cannot have this configuration: (.|\n)*{why}"):
        planned_files(host, "1", [HandlerSpec("kata-big", (text,))])


def test_they_follow_what_is_wanted_and_go_without_a_trace(host: Host) -> None:
    write_files(host, planned_files(host, "1", [BIG, HandlerSpec("kata", ("[runtime]\n",))]))
    first = read_files(host)
    assert payloads(host) == ["1"], "their folder is no payload"
    write_files(host, planned_files(host, "1", [msgspec.structs.replace(BIG, drop_ins=BIG.drop_ins[:1])]))
    assert [path.removeprefix("/opt/katapod/handlers/") for path in read_files(host)] == [
        "kata-big/config.d/zz-katapod-0.toml",
        "kata-big/configuration.toml",
    ]
    write_files(host, first)
    assert read_files(host) == first
    write_files(host, {})
    assert sorted(path.name for path in host.path("/opt/katapod").iterdir()) == ["1"]


def test_settings_are_told_apart_and_the_default_ones_have_no_digest() -> None:
    assert default_settings().digest() == ""
    assert NodeSettings((HandlerSpec("kata", measure=True),)).digest() != NodeSettings((BIG,)).digest() != ""
    assert parse_settings(msgspec.json.encode(NodeSettings((BIG,))).decode()) == NodeSettings((BIG,))


@pytest.mark.parametrize("text", ["", "{}", '{"handlers": []}', '{"handlers": [{"name": "../x"}]}', '{"other": 1}'])
def test_settings_that_make_no_sense_are_refused(text: str) -> None:
    import argparse

    with pytest.raises(argparse.ArgumentTypeError):
        parse_settings(text)
