"""What somebody deletes by name: what runs stays, and what has just stopped is waited for."""

import asyncio
import os
from pathlib import Path

import pytest

from katapod.host.state import StateStore, supervisor_alive
from katapod.model.errors import InvalidState
from katapod.model.layout import SandboxPaths
from katapod.model.record import ContainerRecord, SandboxRecord, State
from katapod.sandbox import deletion
from katapod.sandbox.deletion import delete_sandbox
from kit.library import layout_below


@pytest.fixture
def store(tmp_path: Path) -> StateStore:
    return StateStore(layout_below(tmp_path))


def owned(store: StateStore, state: State) -> int:
    """A sandbox whose supervisor lives as long as the lock that is returned is open."""
    return store.create(SandboxRecord("s1", created_at=1.0, supervisor_pid=1, boot_id="b", state=state))


async def test_what_runs_stays(store: StateStore) -> None:
    lock = owned(store, State.RUNNING)
    with pytest.raises(InvalidState, match="cannot delete s1: it is running"):
        await delete_sandbox(store, "s1")
    assert store.ids() == ["s1"]
    os.close(lock)


async def test_a_supervisor_that_has_said_that_it_is_over_is_waited_for(
    store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = owned(store, State.STOPPED)
    looked = asyncio.Event()

    def alive(paths: SandboxPaths) -> bool:
        looked.set()
        return supervisor_alive(paths)

    monkeypatch.setattr(deletion, "supervisor_alive", alive)
    deleting = asyncio.create_task(delete_sandbox(store, "s1"))
    await looked.wait()
    assert not deleting.done()
    os.close(lock)
    await deleting
    assert store.ids() == []


async def test_what_list_shows_as_stopped_is_not_called_running(store: StateStore) -> None:
    """Its container has ended, and its VM is still being ended."""
    ended = ContainerRecord("s1", image="busybox", command=("true",), state=State.STOPPED, exit_code=0)
    record = SandboxRecord(
        "s1", created_at=1.0, supervisor_pid=1, boot_id="b", state=State.RUNNING, containers=(ended,)
    )
    assert record.shown_state is State.STOPPED
    lock = store.create(record)
    deleting = asyncio.create_task(delete_sandbox(store, "s1"))
    await asyncio.sleep(0)
    os.close(lock)
    await deleting
    assert store.ids() == []


async def test_a_pod_whose_containers_have_ended_runs(store: StateStore) -> None:
    ended = ContainerRecord("s1", image="pause", command=("pause",), state=State.STOPPED, exit_code=0)
    record = SandboxRecord(
        "s1", created_at=1.0, supervisor_pid=1, boot_id="b", state=State.RUNNING, pod=True, containers=(ended,)
    )
    assert record.shown_state is State.RUNNING
    lock = store.create(record)
    with pytest.raises(InvalidState, match="it is running"):
        await delete_sandbox(store, "s1")
    os.close(lock)


async def test_one_that_does_not_end_stays(store: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deletion, "ENDING_LIMIT_S", 0.1)
    lock = owned(store, State.STOPPED)
    with pytest.raises(InvalidState, match="it is running"):
        await delete_sandbox(store, "s1")
    assert store.ids() == ["s1"]
    os.close(lock)
