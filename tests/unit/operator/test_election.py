"""Of several operators at most one acts, whatever of their requests arrives; and one does, if it can ask."""

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from katapod.operator.cluster.election import LEASE_S, RENEW_LIMIT_S, Elector, LeaseView, claim, parse_lease
from katapod.operator.cluster.errors import ClusterFailed
from kit.loop_time import LoopClock


class Store:
    """A lease as the API server keeps it: what names an old version is refused."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.version = 0
        self.cut = ""  # "before": no request arrives; "after": no answer does

    async def read_lease(self, name: str) -> LeaseView | None:
        self._fail("before", "after")
        return None if self.lease is None else parse_lease(self.lease)

    async def write_lease(self, body: dict[str, Any]) -> LeaseView | None:
        self._fail("before")
        version = body["metadata"].get("resourceVersion", "")
        if version != (self.lease["metadata"]["resourceVersion"] if self.lease else ""):
            return None
        self.version += 1
        self.lease = {**body, "metadata": {**body["metadata"], "resourceVersion": str(self.version)}}
        self._fail("after")
        return parse_lease(self.lease)

    def _fail(self, *ways: str) -> None:
        if self.cut in ways:
            raise ClusterFailed("no API server")


class Side:
    """Operators with one clock between them."""

    def __init__(self, *names: str) -> None:
        self.now = 1000.0
        self.store = Store()
        self.gained: list[str] = []
        self.all = {name: self._elector(name) for name in names}

    def _elector(self, name: str) -> Elector:
        return Elector(self.store, name, lambda: self.gained.append(name), lambda: self.now)

    def acting(self) -> list[str]:
        return [name for name, one in self.all.items() if one.left_s()]

    def later(self, span_s: float, *names: str) -> None:
        """Time goes by, and these ask every other second."""
        end = self.now + span_s
        while self.now < end:
            self.now = min(self.now + 2, end)
            for name in names:
                asyncio.run(self.all[name].step())
            assert len(self.acting()) <= 1


@pytest.fixture
def side() -> Side:
    return Side("a", "b")


def test_one_acts_and_goes_on(side: Side) -> None:
    side.later(60, "a", "b")
    assert side.acting() == ["a"]
    assert side.gained == ["a"]


def test_another_takes_over_when_the_holder_is_gone(side: Side) -> None:
    side.later(10, "a", "b")
    side.later(LEASE_S - 2, "b")
    assert side.acting() == []
    side.later(4, "b")
    assert side.acting() == ["b"]
    side.later(20, "a", "b")
    assert side.acting() == ["b"], "the one that comes back has to wait"


def test_a_holder_that_cannot_renew_stops(side: Side) -> None:
    side.later(4, "a")
    side.store.cut = "before"
    side.later(RENEW_LIMIT_S - 1, "a")
    assert side.acting() == ["a"]
    side.later(2, "a")
    assert side.acting() == []
    side.store.cut = ""
    side.later(2, "a")
    assert side.gained == ["a", "a"], "it is told that it acts again"


def test_a_lost_answer_does_not_lose_the_lease(side: Side) -> None:
    side.later(4, "a", "b")
    side.store.cut = "after"
    side.later(6, "a")
    side.store.cut = ""
    side.later(6, "a", "b")
    assert side.acting() == ["a"]
    assert side.gained == ["a"]


def test_a_released_lease_is_taken_at_once(side: Side) -> None:
    side.later(4, "a", "b")
    asyncio.run(side.all["a"].release())
    assert side.acting() == []
    side.later(2, "b")
    assert side.acting() == ["b"]
    assert side.store.lease is not None
    assert side.store.lease["spec"]["leaseTransitions"] == 1


def test_a_container_that_is_started_again_goes_on_at_once(side: Side) -> None:
    side.later(4, "a")
    side.all["again"] = Elector(side.store, "a", lambda: side.gained.append("again"), lambda: side.now)
    del side.all["a"]
    side.later(2, "again")
    assert side.acting() == ["again"]


def test_a_lease_that_somebody_has_removed_is_made_again(side: Side) -> None:
    side.later(4, "a", "b")
    side.store.lease = None
    side.later(6, "a", "b")
    assert len(side.acting()) == 1


STEPS = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from(["", "before", "after"]), st.floats(0, 9)), max_size=60
)


@given(STEPS)
def test_never_two(steps: list[tuple[str, str, float]]) -> None:
    side = Side("a", "b", "c")
    with asyncio.Runner() as runner:  # a loop for each step would take most of the time
        for name, cut, pause_s in steps:
            side.store.cut = cut
            runner.run(side.all[name].step())
            assert len(side.acting()) <= 1
            side.now += pause_s
            assert len(side.acting()) <= 1
    side.store.cut = ""
    side.later(LEASE_S + 4, "a", "b", "c")
    assert len(side.acting()) == 1


def test_one_that_gets_no_answer_at_all_stops() -> None:
    """A request that hangs is given up, so that the loop goes on."""

    class Silent(Store):
        async def write_lease(self, body: dict[str, Any]) -> LeaseView | None:
            await asyncio.Event().wait()
            raise AssertionError

    async def run() -> None:
        elector = Elector(Silent(), "a", lambda: None)
        task = asyncio.create_task(elector.step())
        await LoopClock().pass_until_done(task, RENEW_LIMIT_S)
        assert elector.left_s() == 0

    asyncio.run(run())


def test_a_lease_of_another_is_left_alone() -> None:
    lease = parse_lease({"metadata": {"resourceVersion": "7"}, "spec": {"holderIdentity": "b"}})
    assert claim(lease, "a", LEASE_S - 0.1, datetime.now(UTC)) is None
    body = claim(lease, "a", LEASE_S, datetime.now(UTC))
    assert body is not None
    assert body["metadata"]["resourceVersion"] == "7"
