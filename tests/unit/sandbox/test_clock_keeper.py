"""The guest's clock is kept that of its host. Both are numbers here: no test changes a real clock."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest

from katapod.plan.clock import MS, Correction, Reading, plan_correction
from katapod.rpc.status import RpcError, StatusCode
from katapod.sandbox import clock
from katapod.sandbox.clock import ClockKeeper
from kit.loop_time import until

SECOND = 1000 * MS


def reading(ahead_ns: int, error_ns: int = 0) -> Reading:
    return Reading(10 * SECOND, 10 * SECOND + error_ns + ahead_ns, 10 * SECOND + 2 * error_ns)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (reading(0), Correction()),
        (reading(MS), Correction()),
        (reading(3 * MS), Correction(slew_ns=-3 * MS)),
        (reading(-49 * MS), Correction(slew_ns=49 * MS)),
        (reading(50 * MS), Correction(step_ns=-50 * MS)),
        (reading(-3600 * SECOND, 40 * MS), Correction(step_ns=3600 * SECOND)),
        (reading(60 * MS, 70 * MS), Correction()),
        (Reading(10 * SECOND, 10 * SECOND, 5 * SECOND), Correction()),  # the host's clock was set in between
    ],
)
def test_small_differences_are_made_good_without_a_jump(given: Reading, wanted: Correction) -> None:
    assert plan_correction(given) == wanted


class World:
    """A host and a guest with a clock each, nanoseconds; an answer takes `delays`, one after another."""

    def __init__(self) -> None:
        self.host = 1_000_000 * SECOND
        self.guest = self.host
        self.monotonic = 0
        self.delays = [MS]
        self.calls: list[tuple[int, int]] = []
        self.refusal: RpcError | None = None
        self.rate_is_wrong = False

    def now_ns(self) -> int:
        return self.host

    def monotonic_ns(self) -> int:
        return self.monotonic

    def source_is_wrong(self) -> bool:
        return self.rate_is_wrong

    def pass_time(self, ns: int) -> None:
        self.host += ns
        self.monotonic += ns
        self.guest += ns

    async def clock(self, *, step_ns: int = 0, slew_ns: int = 0, other_source: bool = False, timeout_s: float) -> int:
        if self.refusal is not None:
            raise self.refusal
        delay = self.delays.pop(0) if len(self.delays) > 1 else self.delays[0]
        self.pass_time(delay // 2)
        self.guest += step_ns + slew_ns
        self.calls.append((step_ns, slew_ns))
        self.rate_is_wrong &= not other_source
        told = self.guest
        self.pass_time(delay // 2)
        return told

    @property
    def ahead(self) -> int:
        return self.guest - self.host


@pytest.mark.parametrize("off", [-86400 * SECOND, -120 * MS, -20 * MS, 0, 20 * MS, 86400 * SECOND])
async def test_one_look_brings_the_clocks_together(off: int) -> None:
    world = World()
    world.guest += off
    assert await ClockKeeper(world, "s1", world.now_ns).look()
    assert abs(world.ahead) <= 2 * MS
    assert all(step == 0 for step, _ in world.calls) is (abs(off) < 50 * MS)


async def test_a_guest_that_answers_late_is_asked_again() -> None:
    """By a late answer a clock that is right must not be made wrong."""
    world = World()
    world.delays = [900 * MS, 400 * MS, 2 * MS]
    assert await ClockKeeper(world, "s1", world.now_ns).look()
    assert world.calls == [(0, 0)] * 3


@contextlib.asynccontextmanager
async def kept(world: World, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[[], Callable[[], None]]]:
    """Run a keeper whose period is longer than the test; yields what returns the bell's own callback."""
    bells: list[Callable[[], None]] = []
    monkeypatch.setattr(clock, "FIRST_S", 0.0)
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "add_reader", lambda fd, callback: bells.append(callback))
    task = asyncio.create_task(ClockKeeper(world, "s1", world.now_ns, world.monotonic_ns).run())
    try:
        await until(lambda: world.calls)
        yield lambda: bells[0]
    finally:
        task.cancel()
        await asyncio.wait({task})


async def test_a_step_of_the_hosts_clock_reaches_the_guest_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    async with kept(world, monkeypatch) as bell:
        assert world.calls == [(0, 0)]
        world.host -= 7200 * SECOND  # somebody has set it; a suspend would have added
        bell()()
        await until(lambda: set(world.calls) != {(0, 0)})
        assert abs(world.ahead) <= 2 * MS
        assert [call for call in world.calls if call != (0, 0)] == [(-7200 * SECOND, 0)]


@pytest.mark.parametrize("ran_ns", [40 * SECOND, 2 * SECOND, 12 * SECOND])
async def test_a_guest_whose_clock_runs_at_a_wrong_rate_takes_another_source(ran_ns: int) -> None:
    """As a TSC does whose frequency was measured on a busy host."""
    world = World()
    world.rate_is_wrong = True
    keeper = ClockKeeper(world, "s1", world.now_ns, world.now_ns)
    assert await keeper.look()
    world.host += 10 * SECOND
    world.guest += 10 * SECOND - 390 * MS  # seen of a healthy clock, one of forty guests on two CPUs
    assert await keeper.look()
    assert world.source_is_wrong(), "that is set right, and the source is left alone"
    world.host += 10 * SECOND
    world.guest += ran_ns
    assert await keeper.look()
    assert not world.source_is_wrong()
    assert abs(world.ahead) <= 2 * MS


async def test_an_agent_without_the_call_is_left_alone() -> None:
    world = World()
    world.refusal = RpcError(StatusCode.UNIMPLEMENTED, "no such method")
    assert not await ClockKeeper(world, "s1", world.now_ns).look()
    world.refusal = RpcError(StatusCode.DEADLINE_EXCEEDED, "late")
    assert await ClockKeeper(world, "s1", world.now_ns).look(), "a busy one is asked again"
