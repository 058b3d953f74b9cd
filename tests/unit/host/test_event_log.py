"""Events of containers: one file that many write, kept short, read while it grows."""

import os
import threading
from pathlib import Path

import pytest
from msgspec.structs import replace

from katapod.host import event_log
from katapod.host.event_log import Event, note_event, read_events
from katapod.model.layout import Layout
from katapod.model.record import ContainerRecord, SandboxRecord
from kit.library import layout_below

RECORD = SandboxRecord("c1", 1.0, 1, "b", labels={"a": "b"}, containers=(ContainerRecord("c1", "busybox", ("sh",)),))


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    found = layout_below(tmp_path)
    found.state_root.mkdir(parents=True)
    return found


def events_of(layout: Layout) -> list[Event]:
    return [event for event in read_events(layout) if event is not None]


def test_what_is_told_is_there(layout: Layout) -> None:
    assert events_of(layout) == []
    note_event(layout, "die", RECORD, exitCode=3)
    note_event(layout, "die", replace(RECORD, pod=True))
    (event,) = events_of(layout)
    assert (event.action, event.container, event.image) == ("die", "c1", "busybox")
    assert (event.labels, event.more) == ({"a": "b"}, {"exitCode": "3"})
    assert layout.event_log.stat().st_mode & 0o777 == 0o600


def test_what_is_no_event_is_passed_over(layout: Layout) -> None:
    layout.event_log.write_bytes(
        b"{}\n\xff\nnot\n" + b'{"time_ns": 1, "action": "start", "container": "c9"}\n{"time_ns"'
    )
    assert [event.container for event in events_of(layout)] == ["c9"]


def test_the_newest_are_kept(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "EVENT_BYTES", 4096)
    for number in range(100):
        note_event(layout, f"e{number}", RECORD)
    found = [event.action for event in events_of(layout)]
    assert found == [f"e{number}" for number in range(100 - len(found), 100)]
    assert 10 < len(found) < 60
    assert layout.event_log.stat().st_size <= 2048


def test_labels_may_be_longer_than_a_line(layout: Layout) -> None:
    note_event(layout, "start", replace(RECORD, labels={"a": "b" * 100_000}))
    assert [(event.action, event.labels) for event in events_of(layout)] == [("start", {})]


def test_what_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    note_event(layout_below(tmp_path / "none"), "start", RECORD)


def test_many_write_and_one_follows(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also across new files: nothing is told twice, and nothing of what is there is missed."""
    monkeypatch.setattr(event_log, "EVENT_BYTES", 65536)
    monkeypatch.setattr(event_log, "POLL_S", 0.01)

    def write(writer: int) -> None:
        for number in range(100):
            note_event(layout, f"{writer}-{number}", RECORD)

    writers = [threading.Thread(target=write, args=(each,)) for each in range(4)]
    for each in writers:
        each.start()
    seen: list[str] = []
    for event in read_events(layout, follow_until=None):
        if event is not None:
            seen.append(event.action)
        elif not any(each.is_alive() for each in writers) and len(seen) >= 400:
            break
    assert sorted(seen) == sorted(f"{writer}-{number}" for writer in range(4) for number in range(100))
    assert os.listdir(layout.state_root)
