"""The log of a container as it is read: both files, the newest lines, what is still being written."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from katapod.host.state import StateStore
from katapod.model.errors import NotFound
from katapod.model.record import SandboxRecord, State
from katapod.sandbox import container_log
from katapod.sandbox.container_log import read_log
from kit.library import layout_below


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StateStore]:
    found = StateStore(layout_below(tmp_path))
    lock = found.create(SandboxRecord("c1", created_at=1.0, supervisor_pid=1, boot_id="b", auto_remove=True))
    yield found
    os.close(lock)


def log_of(store: StateStore) -> Path:
    path = store.layout.sandbox("c1").container_log
    path.parent.mkdir(parents=True)
    return path


def texts(store: StateStore, tail: int | None = None) -> list[bytes]:
    return [line.text for line in read_log(store, "c1", tail=tail)]


def test_a_part_of_the_time(store: StateStore) -> None:
    path = log_of(store)
    stamps = [f"2026-01-01T00:00:0{second}.000000000Z" for second in range(4)]
    path.write_text("".join(f"{stamp} stdout F {number}\n" for number, stamp in enumerate(stamps)))
    found = read_log(store, "c1", since=stamps[1].encode(), until=stamps[3].encode())
    assert [line.text for line in found] == [b"1", b"2"]
    found = read_log(store, "c1", since=stamps[1].encode(), tail=1)
    assert [line.text for line in found] == [b"3"]


def test_the_older_file_comes_first(store: StateStore) -> None:
    path = log_of(store)
    path.with_name("container.log.1").write_bytes(b"t stdout F one\n")
    path.write_bytes(b"t stdout F two words\nt stderr P half")
    assert texts(store) == [b"one", b"two words"], "a line that is not ended is still being written"
    path.write_bytes(b"t stdout F \nt stderr P half\n")
    assert [(line.stream, line.whole, line.text) for line in read_log(store, "c1")][1:] == [
        (b"stdout", True, b""),
        (b"stderr", False, b"half"),
    ]
    assert texts(store, tail=1) == [b"half"]
    assert texts(store, tail=0) == []


def test_followed_to_its_end(store: StateStore) -> None:
    path = log_of(store)
    path.write_bytes(b"t stdout F one\n")
    lines = read_log(store, "c1", follow=True)
    assert next(lines).text == b"one"
    os.rename(path, f"{path}.1")
    path.write_bytes(b"t stdout F two\n")
    assert next(lines).text == b"two"
    with path.open("ab") as handle:
        handle.write(b"t stdout F three\n")
    store.write(SandboxRecord("c1", created_at=1.0, supervisor_pid=1, boot_id="b", state=State.STOPPED))
    assert [line.text for line in lines] == [b"three"]


def test_what_is_written_before_a_rotation_after_it_was_read(
    store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = log_of(store)
    path.write_bytes(b"t stdout F one\n")
    read, reads = container_log._whole_lines, iter(range(100))

    def overtaken(handle: BinaryIO) -> Iterator[bytes]:
        yield from read(handle)
        if next(reads) == 1:
            with path.open("ab") as late:
                late.write(b"t stdout F two\n")
            os.rename(path, f"{path}.1")
            path.write_bytes(b"t stdout F three\n")

    monkeypatch.setattr(container_log, "_whole_lines", overtaken)
    lines = read_log(store, "c1", follow=True)
    assert [next(lines).text for _ in range(3)] == [b"one", b"two", b"three"]
    opened = [os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.exists(entry.path)]
    assert [name for name in opened if "container.log" in name] == [str(path)], "the former file was closed"


def test_without_a_log(store: StateStore) -> None:
    with pytest.raises(NotFound, match="cannot print the log of c1: it has none"):
        texts(store)
    with pytest.raises(NotFound, match="no such container"):
        list(read_log(store, "c2"))
