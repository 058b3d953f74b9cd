"""What the host keeps a guest waiting does not count against it."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from katapod.host.thread_times import ThreadTimes
from katapod.sandbox import patience
from katapod.sandbox.patience import Patience, patient_timeout

LIMIT_S = 0.05
NO_PID = 2**22 + 1
S = 10**9

Waits = dict[int, dict[int, float]]
"""Seconds by process and thread; the first process is the VM."""


def kernel_tells(monkeypatch: pytest.MonkeyPatch, waits: Callable[[], Waits]) -> None:
    monkeypatch.setattr(patience, "descendants", lambda pid: iter(waits() if pid else ()))
    monkeypatch.setattr(
        patience,
        "thread_times",
        lambda pid: [ThreadTimes(thread, "x", 0, int(waited * S)) for thread, waited in waits()[pid].items()],
    )


async def expires(limit_s: float = LIMIT_S, pid: int = 1) -> float:
    """After how long, in seconds."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(TimeoutError):
        async with patient_timeout(limit_s, SimpleNamespace(pid=pid)):
            await asyncio.sleep(60)
    return loop.time() - began


async def test_a_guest_that_has_not_waited_has_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_tells(monkeypatch, lambda: {1: {1: 500.0}})  # all of it before
    monkeypatch.setattr(patience, "PATIENCE", 10**6)  # the limit itself ends this
    assert await expires() >= LIMIT_S


async def test_the_limit_grows_by_what_was_waited_and_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    kernel_tells(monkeypatch, lambda: {1: {1: loop.time()}})  # it only waits
    assert await expires() >= LIMIT_S * patience.PATIENCE


async def test_the_vm_may_start_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """User-mode Linux has no process before it runs."""
    loop = asyncio.get_running_loop()
    kernel_tells(monkeypatch, lambda: {1: {1: loop.time()}})
    guest = SimpleNamespace(pid=0)
    loop.call_soon(setattr, guest, "pid", 1)
    began = loop.time()
    with pytest.raises(TimeoutError):
        async with patient_timeout(LIMIT_S, guest):
            await asyncio.sleep(60)
    assert loop.time() - began >= LIMIT_S * (patience.PATIENCE - 1)


@pytest.mark.parametrize(
    ("before", "after", "waited_s"),
    [
        ({1: {1: 7.0, 2: 8.0}}, {1: {1: 8.0, 2: 10.0}}, 2.0),
        ({1: {1: 7.0}, 5: {5: 1.0}}, {1: {1: 7.5}, 5: {5: 2.0}}, 1.5),
        ({1: {1: 7.0}}, {1: {1: 7.0}, 5: {5: 2.0}}, 2.0),
        ({1: {1: 7.0}, 5: {5: 90.0}}, {1: {1: 8.0}}, 1.0),
        ({1: {1: 0.0}, 5: {5: 0.0}}, {1: {1: 9.0}, 5: {5: 9.0}}, 10.0),
    ],
    ids=[
        "threads side by side",
        "processes one at a time",
        "a process that has started",
        "a process that has ended",
        "never more than has passed",
    ],
)
def test_what_counts_as_waiting(before: Waits, after: Waits, waited_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    told = [before, after]
    kernel_tells(monkeypatch, lambda: told[0])
    had = Patience(SimpleNamespace(pid=1))
    del told[0]
    had.count(10.0)
    assert had.waited_s == pytest.approx(waited_s)
    assert had.had_s == pytest.approx(min(10.0 - waited_s, patience.LATE_S))


def test_what_this_process_has_slept_through_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped, or without a CPU itself: the answer may be there by now."""
    kernel_tells(monkeypatch, lambda: {1: {1: 0.0}})
    had = Patience(SimpleNamespace(pid=1))
    had.count(3600.0)
    assert had.had_s == patience.LATE_S


def test_waiting_is_told_where_it_made_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_tells(monkeypatch, lambda: {1: {1: 0.0}})
    had = Patience(SimpleNamespace(pid=1))
    assert had.left_out() == ""
    had.waited_s = 61.7
    assert had.left_out() == ", beside 62 s for which this host gave it no CPU"


@pytest.mark.parametrize("pid", [0, NO_PID])
async def test_work_that_is_done_in_time_is_left_alone(pid: int) -> None:
    async with patient_timeout(60, SimpleNamespace(pid=pid)):
        await asyncio.sleep(0)


def test_waiting_is_read_from_the_kernel_for_children_too() -> None:
    """Of a process that runs on the one CPU that this one uses as well."""
    cpu = min(os.sched_getaffinity(0))
    spin = f"import os; os.sched_setaffinity(0, [{cpu}])\nprint(flush=True)\nwhile True: pass"
    with (
        subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE) as one,
        subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE) as other,
    ):
        had = Patience(SimpleNamespace(pid=os.getpid()))
        while had.waited_s < 0.1:
            had.count(1.0)
        one.kill()
        other.kill()
