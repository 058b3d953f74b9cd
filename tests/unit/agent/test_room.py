"""What containers leave of a guest to its kernel and to the agent: the limits of the group above them."""

from __future__ import annotations

from pathlib import Path

import pytest

from katapod.agent import container, room
from katapod.agent.container import Container
from katapod.rpc.status import RpcError, StatusCode

MIB = 1 << 20


def test_memory_that_others_had_before_is_not_the_containers() -> None:
    assert room.memory_for_containers(216 * MIB, 216 * MIB, 64 * MIB) == (216 - 64 - 16) * MIB - 216 * MIB // 64


def test_memory_that_is_plugged_is_theirs_less_its_page_structures() -> None:
    small = room.memory_for_containers(256 * MIB, 256 * MIB, 64 * MIB)
    grown = room.memory_for_containers((256 + 1024) * MIB, 256 * MIB, 64 * MIB)
    assert grown - small == (1024 - 16 - 16) * MIB


def test_a_guest_without_memory_to_spare_promises_none() -> None:
    assert room.memory_for_containers(64 * MIB, 64 * MIB, 60 * MIB) == 0


@pytest.mark.parametrize(
    ("possible", "memory_mib", "wanted"),
    [
        (16000, 1900, 15200),  # by memory: 8 for each MiB
        (4096, 1900, 4096 - 70 - 128 - 32),  # what the host lets a guest of User-mode Linux have
        (1610, 130, 1040),
        (200, 130, 64),
    ],
)
def test_processes(possible: int, memory_mib: int, wanted: int) -> None:
    assert room.processes_for_containers(possible, 70, 2, memory_mib * MIB) == wanted


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in place of the guest's cgroups; memory and processes are this machine's."""
    monkeypatch.setattr(room, "CGROUP_ROOT", str(tmp_path))
    monkeypatch.setattr(container, "CGROUP_ROOT", str(tmp_path))
    for directory in (tmp_path, tmp_path / "containers"):
        directory.mkdir(exist_ok=True)
        (directory / "cgroup.controllers").write_text("cpu memory pids")
    return tmp_path


def test_the_group_has_limits_that_follow_the_memory(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_memory", lambda: (256 * MIB, 192 * MIB))
    found = room.Room(4096)
    found.follow(1)
    group = groups / "containers"
    small = int((group / "memory.max").read_text())
    assert 150 * MIB < small < 192 * MIB
    assert int((group / "pids.max").read_text()) == small // room.PROCESS_COST
    assert (groups / "cgroup.subtree_control").read_text() == "+pids", "the last that was switched on"

    monkeypatch.setattr(room, "_memory", lambda: (2304 * MIB, 1000 * MIB))
    found.follow(1)
    assert int((group / "memory.max").read_text()) > small + 1900 * MIB
    assert 3000 < int((group / "pids.max").read_text()) < 4096 - room.PROCESSES_KEPT


def test_nothing_is_written_while_nothing_has_changed(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_memory", lambda: (256 * MIB, 192 * MIB))
    found = room.Room(0)
    found.follow(1)
    (groups / "containers/pids.max").write_text("77")  # somebody in the debug console
    found.follow(1)
    assert (groups / "containers/pids.max").read_text() == "77"


def test_a_guest_without_cgroups_runs_containers_all_the_same(groups: Path) -> None:
    (groups / "cgroup.controllers").unlink()
    found = room.Room(0)
    found.follow(1)
    found.admit(Container("c1", "/containers/c1"))


def test_who_may_still_run_something_in_a_full_group(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_memory", lambda: (256 * MIB, 192 * MIB))
    found = room.Room(0)
    found.follow(1)
    full = int((groups / "containers/pids.max").read_text())
    box = Container("c1", "/containers/c1")

    (groups / "containers/pids.current").write_text(f"{full + room.EXECS_BEYOND - 1}\n")
    found.admit(box)
    (groups / "containers/pids.current").write_text(f"{full + room.EXECS_BEYOND}\n")
    with pytest.raises(RpcError, match=rf"container c1: the sandbox's containers have {full + 64} processes") as caught:
        found.admit(box)
    assert caught.value.code is StatusCode.RESOURCE_EXHAUSTED


def test_a_full_group_explains_why_nothing_starts(groups: Path) -> None:
    found = room.Room(0)
    box = Container("c1", "/containers/c1")
    own = groups / "containers/c1"
    own.mkdir()
    assert found.explain(box) is None

    for directory, count, limit in ((own, 7, "max"), (groups / "containers", 7, "900")):
        (directory / "pids.current").write_text(f"{count}\n")
        (directory / "pids.max").write_text(f"{limit}\n")
    assert found.explain(box) is None

    (groups / "containers/pids.current").write_text("901\n")
    assert "the sandbox's containers have 901 processes" in str(found.explain(box))
    (own / "pids.max").write_text("7\n")
    assert "c1: it has 7 processes and threads, and its limit is 7" in str(found.explain(box))
