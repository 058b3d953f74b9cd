"""Parsing in the agent: options, ids, PCI paths, mount options, statistics; and the table of methods."""

from __future__ import annotations

from pathlib import Path

import pytest

from katapod.agent.devices import parse_pci_path
from katapod.agent.guest import _set_online
from katapod.agent.methods import METHODS, load_method
from katapod.agent.oom import parse_oom_kills
from katapod.agent.options import UsageError, parse_arguments, parse_cmdline
from katapod.agent.paths import check_id
from katapod.agent.stats import parse_io_stat, parse_keyed
from katapod.kernel.mount import parse_options
from katapod.rpc.pb import agent_pb2, health_pb2, inspection_pb2, katapod_pb2
from katapod.rpc.status import RpcError, StatusCode


def test_command_line() -> None:
    options = parse_cmdline(
        "quiet agent.log=debug agent.debug_console agent.debug_console_vport=77 agent.hotplug_timeout=9 "
        "agent.container_pipe_size=4096 agent.unknown=1 katapod.prove=abc agent.server_addr=unix:///s "
        "katapod.fixed_addresses katapod.processes=4096\n"
    )
    assert options.log_level == "debug"
    assert options.debug_console
    assert options.debug_console_vport == 77
    assert options.hotplug_timeout_s == 9
    assert options.container_pipe_size_bytes == 4096
    assert options.prove_token == "abc"
    assert options.fixed_addresses
    assert options.processes_max == 4096
    assert options.server_addr == "unix:///s"


def test_senseless_values_leave_the_defaults() -> None:
    options = parse_cmdline("agent.hotplug_timeout=-1 agent.debug_console_vport=x agent.debug_console=false")
    assert options.hotplug_timeout_s == 3
    assert options.debug_console_vport == 1026
    assert not options.debug_console
    assert not options.fixed_addresses


def test_arguments_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KATA_AGENT_SERVER_ADDR", "vsock://-1:9")
    assert parse_arguments([], "agent.server_addr=unix:///a").server_addr == "vsock://-1:9"
    assert parse_arguments(["--listen", "unix:///b"], "").server_addr == "unix:///b"
    with pytest.raises(UsageError, match="--nonsense"):
        parse_arguments(["--nonsense"], "")


@pytest.mark.parametrize("text", ["c1", "0a.b_c-d", "x" * 200])
def test_good_ids(text: str) -> None:
    assert check_id(text, "container id") == text


@pytest.mark.parametrize("text", ["", ".", "..", "a/b", "a\0b", "ä", "-x", "x" * 201, "shared", "a b"])
def test_bad_ids(text: str) -> None:
    with pytest.raises(RpcError) as caught:
        check_id(text, "container id")
    assert caught.value.code == StatusCode.INVALID_ARGUMENT


def test_pci_path() -> None:
    assert parse_pci_path("02/01.3/1f") == ["02.0", "01.3", "1f.0"]


@pytest.mark.parametrize("text", ["", "2", "20", "02/", "02/xx", "02.8", "-1", "../.."])
def test_bad_pci_path(text: str) -> None:
    with pytest.raises(RpcError):
        parse_pci_path(text)


def test_mount_options() -> None:
    assert parse_options(["ro", "nosuid", "size=1m", "rw", "mode=755"]) == (2, "size=1m,mode=755")
    assert parse_options(["rbind", "rprivate"]) == (4096 | 16384 | 1 << 18, "")


def test_statistics_files() -> None:
    assert parse_keyed("usage_usec 5\nbroken\nx max\n") == {"usage_usec": 5}
    assert parse_io_stat("254:0 rbytes=1 wbytes=2 rios=3\n8:1\n") == [
        (254, 0, {"rbytes": 1, "wbytes": 2, "rios": 3}),
        (8, 1, {}),
    ]
    assert parse_oom_kills("low 0\noom 3\noom_kill 2\noom_group_kill 0\n") == 2
    assert parse_oom_kills("") == 0


def test_every_method_of_the_table_exists_on_both_sides() -> None:
    services = {
        "grpc.AgentService": agent_pb2.DESCRIPTOR.services_by_name["AgentService"],
        "grpc.Health": health_pb2.DESCRIPTOR.services_by_name["Health"],
        "katapod.Guest": katapod_pb2.DESCRIPTOR.services_by_name["Guest"],
        "katapod.Inspection": inspection_pb2.DESCRIPTOR.services_by_name["Inspection"],
    }
    for entry in METHODS:
        service, method = entry.split("/")
        assert method in services[service].methods_by_name
        assert load_method(service, method) is not None


def test_no_more_cpus_are_put_online_than_wanted(tmp_path: Path) -> None:
    """The kernel knows of CPUs that are not plugged in yet, and waits ten seconds for such a one."""
    (tmp_path / "cpu0").mkdir()  # has no switch
    (tmp_path / "cpufreq").mkdir()
    for number in (1, 2, 10):
        (tmp_path / f"cpu{number}").mkdir()
        (tmp_path / f"cpu{number}/online").write_text("0\n")

    def states() -> list[str]:
        return [(tmp_path / f"cpu{number}/online").read_text().strip() for number in (1, 2, 10)]

    assert _set_online(str(tmp_path), "cpu", 3) == 3
    assert states() == ["1", "1", "0"]
    assert _set_online(str(tmp_path), "cpu", 3) == 3
    assert _set_online(str(tmp_path), "cpu") == 4
    assert states() == ["1", "1", "1"]
    assert _set_online(str(tmp_path / "none"), "cpu", 1) == 0
