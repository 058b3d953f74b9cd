"""The state directory: taking a name, telling whether its supervisor lives, and writing in one step."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from msgspec.structs import replace

from katapod.host.state import StateStore, supervisor_alive, write_atomically
from katapod.model.errors import AlreadyExists, KatapodError, NoSpace, NotFound
from katapod.model.layout import Layout
from katapod.model.record import SandboxRecord

HOLD = """
import sys, time
from pathlib import Path
from katapod.host.state import StateStore
from katapod.model.layout import Layout
from katapod.model.record import SandboxRecord
lock = StateStore(Layout(state_root=Path(sys.argv[1]))).create(SandboxRecord("s1", 1.0, 1, "b"))
print("held", flush=True)
time.sleep(60)
"""


def record(sandbox_id: str = "s1") -> SandboxRecord:
    return SandboxRecord(sandbox_id, created_at=1.0, supervisor_pid=os.getpid(), boot_id="boot")


@pytest.fixture
def store(tmp_path: Path) -> StateStore:
    return StateStore(Layout(state_root=tmp_path / "sbs"))


def test_create_read_list(store: StateStore) -> None:
    assert store.ids() == []
    lock = store.create(record())
    assert store.read("s1") == record()
    assert store.ids() == ["s1"]
    assert list(store.records()) == [record()]
    paths = store.layout.sandbox("s1")
    assert paths.state.stat().st_mode & 0o777 == 0o700
    os.close(lock)


def test_a_taken_name(store: StateStore) -> None:
    lock = store.create(record())
    with pytest.raises(AlreadyExists, match="cannot create s1: the name is taken") as caught:
        store.create(record())
    assert "kata-runtime delete s1" in caught.value.hint
    os.close(lock)


def test_the_lock_tells_whether_the_supervisor_lives(store: StateStore) -> None:
    lock = store.create(record())
    paths = store.layout.sandbox("s1")
    assert supervisor_alive(paths)
    os.close(lock)
    assert not supervisor_alive(paths)
    assert not supervisor_alive(store.layout.sandbox("none"))


def test_a_killed_supervisor_is_dead_at_once(store: StateStore) -> None:
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(store.layout.state_root)], stdout=subprocess.PIPE)
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        paths = store.layout.sandbox("s1")
        assert supervisor_alive(paths)
        with pytest.raises(AlreadyExists):
            store.create(record())
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert not supervisor_alive(paths)


def test_looking_at_a_lock_never_disturbs_who_takes_it(store: StateStore) -> None:
    """`list` looks at every lock, also at the one that `run` is about to take."""
    stop = threading.Event()
    paths = store.layout.sandbox("s1")

    def look() -> None:
        while not stop.is_set():
            supervisor_alive(paths)

    lookers = [threading.Thread(target=look) for _ in range(3)]
    for looker in lookers:
        looker.start()
    try:
        for _ in range(300):
            lock = store.create(record())
            os.close(lock)
            paths.lock.unlink()
            paths.persist.unlink()
            paths.state.rmdir()
    finally:
        stop.set()
        for looker in lookers:
            looker.join()


def test_two_who_look_do_not_take_each_other_for_the_supervisor(store: StateStore) -> None:
    os.close(store.create(record()))
    paths = store.layout.sandbox("s1")
    seen: list[bool] = []
    real_flock = fcntl.flock

    def flock(fd: int, operation: int) -> None:
        real_flock(fd, operation)
        if not seen:  # the second looks while the first has the lock
            seen.append(False)
            seen.append(supervisor_alive(paths))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", flock)
        assert not supervisor_alive(paths)
    assert seen == [False, False]


def test_a_directory_that_cannot_be_finished_does_not_keep_the_name(
    store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = os.open

    def full(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if str(path).endswith("lock"):
            raise OSError(28, "No space left on device")
        return real_open(path, flags, mode, dir_fd=dir_fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", full)
        with pytest.raises(NoSpace, match="No space left"):
            store.create(record())
    assert store.ids() == []
    os.close(store.create(record()))


def test_a_record_that_is_not_there(store: StateStore) -> None:
    with pytest.raises(NotFound, match="cannot find s9: no such container"):
        store.read("s9")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"sandbox_id": 5}', '{"unknown": 1}'])
def test_a_record_that_cannot_be_read(store: StateStore, text: str) -> None:
    os.close(store.create(record()))
    store.layout.sandbox("s1").persist.write_text(text)
    with pytest.raises(KatapodError, match=r"cannot read .*/s1/persist\.json"):
        store.read("s1")
    assert store.ids() == ["s1"]
    assert list(store.records()) == []


def test_write_atomically(tmp_path: Path) -> None:
    write_atomically(tmp_path / "f", b"one")
    write_atomically(tmp_path / "f", b"two")
    assert (tmp_path / "f").read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["f"]
    with pytest.raises(KatapodError, match=r"cannot write .*/none/f: No such file"):
        write_atomically(tmp_path / "none" / "f", b"x")


def test_a_name_for_a_file_that_is_a_directory(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    with pytest.raises(KatapodError, match="Is a directory"):
        write_atomically(tmp_path / "f", b"x")
    assert os.listdir(tmp_path) == ["f"]


def test_a_name_that_is_taken_again(store: StateStore) -> None:
    with pytest.raises(NotFound, match="cannot find s1"):
        store.reclaim(record())
    os.close(store.create(record()))
    left = store.layout.sandbox("s1").control_socket
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(left))
    lock = store.reclaim(replace(record(), restarts=3))
    assert not left.exists(), "nobody listens any more, and the name would be taken"
    assert supervisor_alive(store.layout.sandbox("s1"))
    assert store.read("s1").restarts == 3
    with pytest.raises(AlreadyExists, match="another process has it"):
        store.reclaim(record())
    assert store.read("s1").restarts == 3
    os.close(lock)
