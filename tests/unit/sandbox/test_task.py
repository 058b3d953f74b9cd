"""A container followed to its exit: its status, and whether its memory limit killed it."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from katapod.model.errors import KatapodError, NoSpace
from katapod.model.exit_status import KILLED_STATUS
from katapod.rpc.pb import agent_pb2
from katapod.sandbox import task
from katapod.sandbox.stdio import NullSink
from katapod.sandbox.task import follow, watch_oom


class Ends:
    """A container that ends with `status`."""

    def __init__(self, container_id: str, status: int) -> None:
        self.container_id = container_id
        self.status = status
        self.out_of_memory = asyncio.Event()
        self.killed = False
        self.sandbox = SimpleNamespace(sandbox_id="s1")
        self.saved: list[dict[str, Any]] = []

    async def carry(self, *streams: Any) -> int:
        return self.status

    def save(self, **changes: Any) -> None:
        self.saved.append(changes)


async def ended(container: Any) -> int:
    return await asyncio.wait_for(follow(container, None, NullSink(), NullSink()), 60)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "OOM_WORD_S", 0.05)


async def test_an_end_like_any_other() -> None:
    container = Ends("s1", 3)
    assert await ended(container) == 3
    assert container.saved == []


async def test_the_word_may_come_after_the_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "OOM_WORD_S", 60.0)
    container = Ends("s1", KILLED_STATUS)
    asyncio.get_running_loop().call_later(0.01, container.out_of_memory.set)
    assert await ended(container) == KILLED_STATUS
    assert container.saved == [{"oom_killed": True}]


async def test_it_is_not_waited_for_long_nor_where_the_vm_goes_on() -> None:
    for name in ("s1", "c2"):
        container = Ends(name, KILLED_STATUS)
        assert await ended(container) == KILLED_STATUS
        assert container.saved == []


async def test_it_is_not_waited_for_after_a_kill_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "OOM_WORD_S", 3600.0)
    container = Ends("s1", KILLED_STATUS)
    container.killed = True
    assert await ended(container) == KILLED_STATUS


async def test_a_full_disk_does_not_hide_the_status(caplog: pytest.LogCaptureFixture) -> None:
    container: Any = Ends("s1", KILLED_STATUS)
    container.out_of_memory.set()

    def save(**changes: Any) -> None:
        raise NoSpace("cannot write it")

    container.save = save
    assert await ended(container) == KILLED_STATUS
    assert "what ended s1 is not on record: cannot write it" in caplog.text


async def test_containers_are_marked_and_told_of_until_the_sandbox_dies() -> None:
    words = ["c1", "", "unknown", "c1"]

    async def call(method: str, request: Any, timeout_s: float | None) -> Any:
        if not words:
            raise KatapodError("the sandbox has died")
        return agent_pb2.OOMEvent(container_id=words.pop(0))

    async def guard(work: Any) -> Any:
        return await work

    sandbox: Any = SimpleNamespace(agent=SimpleNamespace(call=call), guard=guard)
    containers: dict[str, Any] = {"c1": Ends("c1", 0), "c2": Ends("c2", 0)}
    told: list[str] = []
    await watch_oom(sandbox, containers, lambda container: told.append(container.container_id))
    assert told == ["c1", "c1"]
    assert [each.out_of_memory.is_set() for each in containers.values()] == [True, False]
