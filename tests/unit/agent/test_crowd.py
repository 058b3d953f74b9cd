"""Execs into a crowded container: crun's priority, and that of what it has started."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from katapod.agent import container, crowd
from katapod.agent.container import Container

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Container:
    monkeypatch.setattr(container, "CGROUP_ROOT", str(tmp_path))
    (tmp_path / "c1").mkdir()
    return Container("c1", "/c1")


@pytest.fixture
def sleepers() -> Iterator[list[int]]:
    with (
        subprocess.Popen(["sleep", "1000"]) as one,
        subprocess.Popen(["sleep", "1000"]) as other,
    ):
        yield [one.pid, other.pid]
        one.kill()
        other.kill()


def test_crun_comes_first_only_where_it_is_crowded(box: Container) -> None:
    assert crowd.nice_for(box) == 0, "there is no such group"
    count = Path(box.cgroup_directory) / "pids.current"
    count.write_text(f"{crowd.CROWD - 1}\n")
    assert crowd.nice_for(box) == 0
    count.write_text(f"{crowd.CROWD}\n")
    assert crowd.nice_for(box) == crowd.NICE


def test_only_what_has_cruns_priority_loses_it(box: Container, sleepers: list[int]) -> None:
    hurried, nicer = sleepers
    os.setpriority(os.PRIO_PROCESS, hurried, crowd.NICE)
    os.setpriority(os.PRIO_PROCESS, nicer, 5)
    ended = subprocess.Popen(["true"])
    ended.wait()
    threads = Path(box.cgroup_directory) / "cgroup.threads"
    threads.write_text("".join(f"{pid}\n" for pid in (ended.pid, hurried, nicer)))
    crowd.calm(box)
    assert [os.getpriority(os.PRIO_PROCESS, pid) for pid in sleepers] == [0, 5]
