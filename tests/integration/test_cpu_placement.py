"""Machines on CPUs of this host: chosen, inherited, moved, left to others."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from katapod.host import cpu_placement
from katapod.host.cpu_placement import CpuPlacement
from katapod.plan.cpu_placement import CpuTimes, Patience
from katapod.tasks import beside

CPUS = sorted(os.sched_getaffinity(0))

pytestmark = [pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs")]

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; print(1, flush=True); time.sleep(600)"])
child.wait()
"""


@contextmanager
def machine(placement: CpuPlacement) -> Iterator[tuple[int, int]]:
    """A process and its child, which it has started."""
    with placement.starting():
        process = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    with process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            child = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            yield process.pid, int(child[0])
        finally:
            for pid in (*map(int, child), process.pid):
                os.kill(pid, 9)


async def until(pids: tuple[int, int], cpus: set[int]) -> None:
    async with asyncio.timeout(180):
        while any(os.sched_getaffinity(pid) != cpus for pid in pids):  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)


def test_what_is_started_inherits_a_cpu_and_we_keep_ours(tmp_path: Path) -> None:
    with CpuPlacement(tmp_path / "d" / "cpus") as placement:
        with machine(placement) as pids:
            assert placement.cpu in CPUS
            assert [os.sched_getaffinity(pid) for pid in pids] == [{placement.cpu}] * 2
        assert sorted(os.sched_getaffinity(0)) == CPUS


def test_those_that_start_at_once_are_spread_and_a_claim_ends_with_its_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_placement, "_cpu_times", dict[int, CpuTimes])  # as if nothing else ran here
    with ExitStack() as stack:
        for each in range(2 * len(CPUS)):
            placement = stack.enter_context(CpuPlacement(tmp_path / "cpus"))
            with placement.starting():
                assert placement.cpu == CPUS[each % len(CPUS)]
    with CpuPlacement(tmp_path / "cpus") as placement, placement.starting():
        assert placement.cpu == CPUS[0]


async def test_a_machine_moves_with_all_that_it_has_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_placement, "consider", lambda *rest, waited_share: (True, Patience()))
    with CpuPlacement(tmp_path / "cpus") as placement, machine(placement) as pids:
        first = placement.cpu
        assert first is not None
        monkeypatch.setattr(cpu_placement, "choose_cpu", lambda allowed, machines, busy: max(set(allowed) - {first}))
        async with beside(placement.follow(pids[0], period_s=0.01), name="follow"):
            await until(pids, {max(set(CPUS) - {first})})


def test_a_machine_that_starts_processes_without_end_is_moved_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        started: list[int] = []

        def with_new_one(pid: int) -> set[int]:
            assert len(started) < 20
            process = stack.enter_context(subprocess.Popen(["sleep", "600"]))
            stack.callback(process.kill)
            started.append(process.pid)
            return {pid, *started}

        monkeypatch.setattr(cpu_placement, "_threads", with_new_one)
        stack.callback(os.sched_setaffinity, 0, CPUS)
        cpu_placement._pin(os.getpid(), {CPUS[-1]})
        assert all(os.sched_getaffinity(pid) == {CPUS[-1]} for pid in started)


async def test_a_machine_that_may_not_use_its_cpu_any_more_gets_another(tmp_path: Path) -> None:
    """As when its cpuset changes."""
    with CpuPlacement(tmp_path / "cpus") as placement, machine(placement) as pids:
        rest = set(CPUS) - {placement.cpu}
        os.sched_setaffinity(pids[0], rest)
        async with beside(placement.follow(pids[0], period_s=0.01), name="follow"):
            await until(pids, {min(rest)})
        assert placement.cpu == min(rest)


async def test_cpus_that_somebody_else_has_set_are_left_alone(tmp_path: Path) -> None:
    with CpuPlacement(tmp_path / "cpus") as placement, machine(placement) as pids:
        os.sched_setaffinity(pids[0], CPUS)
        async with asyncio.timeout(180):
            await placement.follow(pids[0], period_s=0.01)
        assert sorted(os.sched_getaffinity(pids[0])) == CPUS


async def test_it_ends_with_its_machine(tmp_path: Path) -> None:
    with CpuPlacement(tmp_path / "cpus") as placement:
        with machine(placement) as pids:
            pass
        async with asyncio.timeout(180):
            await placement.follow(pids[0], period_s=0.01)
