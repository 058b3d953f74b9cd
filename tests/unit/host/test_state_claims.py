"""Taking a name, giving it back, and removing at the same time: the directories and locks of StateStore."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from katapod.host.state import StateStore, supervisor_alive
from katapod.model.errors import AlreadyExists, KatapodError
from katapod.model.layout import Layout
from katapod.model.record import SandboxRecord


@pytest.fixture
def store(tmp_path: Path) -> StateStore:
    return StateStore(
        Layout(
            state_root=tmp_path / "sbs",
            vm_root=tmp_path / "vm",
            share_root=tmp_path / "share",
            data_root=tmp_path / "data",
        )
    )


def record(name: str) -> SandboxRecord:
    return SandboxRecord(name, time.time(), os.getpid(), "boot")


def test_a_claim_is_complete_from_the_first_moment(store: StateStore) -> None:
    """Whoever sees the directory sees a record in it, and a living supervisor."""
    over = threading.Event()
    seen: list[str] = []

    def watch() -> None:
        while not over.is_set():
            for name in store.ids():
                paths = store.layout.sandbox(name)
                alive, written = supervisor_alive(paths), paths.persist.exists()
                if not (alive and written) and paths.state.exists():
                    seen.append(f"{name}: alive {alive}, record {written}")

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        locks = [store.create(record(f"s{number}")) for number in range(100)]
        over.set()
        watching.result()
    for lock in locks:
        os.close(lock)
    assert seen == []


def test_only_one_gets_a_name(store: StateStore) -> None:
    def claim(_: int) -> int:
        try:
            return store.create(record("s1"))
        except AlreadyExists:
            return -1

    with ThreadPoolExecutor(8) as pool:
        locks = [lock for lock in pool.map(claim, range(8)) if lock >= 0]
    assert len(locks) == 1
    assert os.listdir(store.layout.state_root) == ["s1"]  # the losers left nothing
    os.close(locks[0])


def test_looking_does_not_take_the_lock(store: StateStore) -> None:
    os.close(store.create(record("s1")))
    paths = store.layout.sandbox("s1")
    with ThreadPoolExecutor(4) as pool:
        assert not any(pool.map(lambda _: supervisor_alive(paths), range(400)))


def test_discard_frees_the_name(store: StateStore) -> None:
    os.close(store.create(record("s1")))
    store.discard("s1")
    store.discard("s1")
    assert os.listdir(store.layout.state_root) == []
    os.close(store.create(record("s1")))


def test_a_file_in_the_place_of_the_root_is_no_taken_name(store: StateStore) -> None:
    store.layout.state_root.touch()
    with pytest.raises(KatapodError, match="cannot write") as caught:
        store.create(record("s1"))
    assert not isinstance(caught.value, AlreadyExists)
    assert store.ids() == []


def test_sweep_takes_old_unlocked_staging_only(store: StateStore) -> None:
    lock = store.create(record("s1"))
    old, fresh, busy = (store.layout.state_root / f".{name}.0123" for name in ("old", "fresh", "busy"))
    for path in (old, fresh):
        path.mkdir()
    os.rename(store.layout.sandbox("s1").state, busy)
    for path in (old, busy):
        os.utime(path, (1, 1))
    store.sweep()
    assert sorted(os.listdir(store.layout.state_root)) == [".busy.0123", ".fresh.0123"]
    assert store.ids() == []
    os.close(lock)


def test_removal_waits_for_the_other_and_sees_that_it_is_done(store: StateStore) -> None:
    os.close(store.create(record("s1")))
    inside = threading.Event()

    def other() -> bool:
        inside.wait()
        with store.removal("s1") as there:
            return there

    with ThreadPoolExecutor(1) as pool:
        with store.removal("s1") as there:
            assert there
            waiting = pool.submit(other)
            inside.set()
            time.sleep(0.1)
            assert not waiting.done()
            store.discard("s1")
            os.close(store.create(record("s1")))  # somebody takes the name at once: that one is not removed
        assert waiting.result() is False
    assert store.ids() == ["s1"]


def test_stray_data_counts_only_from_before_this_boot(store: StateStore) -> None:
    (store.layout.data_root / "s1").mkdir(parents=True)
    (store.layout.data_root / "s2").mkdir(parents=True)
    os.close(store.create(record("s2")))
    assert store.stray_ids(booted_at=time.time() - 100) == []
    assert store.stray_ids(booted_at=time.time() + 100) == ["s1"]
