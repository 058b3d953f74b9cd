"""The trace of a start, as a viewer of Chrome's trace format reads it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from katapod.host import trace


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file that this process traces into, until the end of the test."""
    path = tmp_path / "trace.json"
    monkeypatch.setenv("KATAPOD_TRACE", str(path))
    monkeypatch.setattr(trace, "_fd", -1)
    monkeypatch.setattr(trace, "_tracks", {})
    trace.start_tracing()
    assert json.loads(path.read_text())
    yield path
    os.close(trace._fd)


def events_of(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())
    return found


def spans_of(path: Path) -> dict[str, dict[str, Any]]:
    return {event["name"]: event for event in events_of(path) if event["ph"] == "X"}


def test_nothing_is_traced_unless_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KATAPOD_TRACE", raising=False)
    monkeypatch.setattr(trace, "_fd", -1)
    monkeypatch.chdir(tmp_path)
    trace.start_tracing()
    assert not trace.enabled()
    with trace.span("work"):
        trace.add_span("other", 1, 2)
    assert list(tmp_path.iterdir()) == []


def test_spans(file: Path) -> None:
    assert trace.enabled()
    before_us = time.time_ns() / 1000
    with trace.span("outer"), trace.span("inner"):
        pass
    after_us = time.time_ns() / 1000
    spans = spans_of(file)
    outer, inner = spans["outer"], spans["inner"]
    assert before_us <= outer["ts"] <= inner["ts"]
    assert inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] <= after_us
    assert (outer["pid"], outer["tid"]) == (inner["pid"], inner["tid"]) == (os.getpid(), 1)


def test_a_span_that_fails_is_there(file: Path) -> None:
    with pytest.raises(ZeroDivisionError), trace.span("fails"):
        _ = 1 / 0
    assert spans_of(file)["fails"]["dur"] >= 0


def test_tracks_are_named_once(file: Path) -> None:
    for _ in range(2):
        trace.add_span("boot", 5_000, 7_500, trace.GUEST)
        trace.add_span("plan", 5_000, 6_000)
    names = [event for event in events_of(file) if event["ph"] == "M"]
    assert [(event["name"], event["args"]["name"]) for event in names] == [
        ("thread_name", trace.HOST),
        ("thread_name", trace.GUEST),
    ]
    spans = spans_of(file)
    assert spans["boot"]["tid"] == names[1]["tid"] != spans["plan"]["tid"]
    assert (spans["boot"]["ts"], spans["boot"]["dur"]) == (5.0, 2.5)  # microseconds


def test_the_start_of_the_interpreter_is_there(file: Path) -> None:
    """It began before this test, and ended when tracing began."""
    interpreter = spans_of(file)["interpreter"]
    assert interpreter["dur"] > 0
    assert interpreter["ts"] < (time.time_ns() - time.clock_gettime_ns(time.CLOCK_PROCESS_CPUTIME_ID)) / 1000
    assert interpreter["ts"] + interpreter["dur"] <= time.time_ns() / 1000


def test_only_its_owner_reads_it(file: Path) -> None:
    assert file.stat().st_mode & 0o777 == 0o600


def run_traced(path: Path, script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"from katapod.host import trace\ntrace.start_tracing()\n{script}"],
        env={**os.environ, "KATAPOD_TRACE": str(path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_processes_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    for name in ("first", "second"):
        done = run_traced(path, f"with trace.span({name!r}): pass")
        assert (done.returncode, done.stderr) == (0, "")
    spans = [event for event in events_of(path) if event["ph"] == "X"]
    assert [span["name"] for span in spans] == ["interpreter", "first", "interpreter", "second"]
    assert len({span["pid"] for span in spans}) == 2


def test_one_that_is_killed_leaves_what_it_had(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    script = f"import os\nwith trace.span('done'): pass\nwith trace.span('cut'): os.kill(os.getpid(), {signal.SIGKILL})"
    assert run_traced(path, script).returncode == -signal.SIGKILL
    assert set(spans_of(path)) == {"interpreter", "done"}


def test_many_at_once_and_forks_keep_it_whole(tmp_path: Path) -> None:
    """Also processes that share one description of the file, as those of the pool."""
    path = tmp_path / "trace.json"
    script = "import os\nfor _ in range(3): os.fork()\nfor n in range(50): trace.add_span(f'{os.getpid()}-{n}', 1, 2)"
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", f"from katapod.host import trace\ntrace.start_tracing()\n{script}"],
            env={**os.environ, "KATAPOD_TRACE": str(path)},
            stdout=subprocess.PIPE,  # held by all that were forked: its end is theirs
        )
        for _ in range(2)
    ]
    for program in programs:
        assert program.communicate(timeout=60)[0] == b""
    spans = [event["name"] for event in events_of(path) if event["ph"] == "X" and event["name"] != "interpreter"]
    assert len(spans) == len(set(spans)) == 2 * 8 * 50


@pytest.mark.parametrize(
    "left",
    ["", "[", "[\n", '[\n{"ph":"X"},\n', '[\n{"ph":"X"},\n{"ph":"', '[\n{"ph":"X"}\n]', '[\n{"ph":"X"}\n'],
)
def test_a_file_that_was_cut_off_is_mended(tmp_path: Path, left: str) -> None:
    path = tmp_path / "trace.json"
    path.write_text(left)
    assert run_traced(path, "trace.add_span('new', 1, 2)").returncode == 0
    events = events_of(path)
    assert events[-1]["name"] == "new"
    assert len(events) == 3 + ("X" in left)  # beside it the name of its track, and its interpreter


def test_a_file_that_is_no_trace_stays(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text("keep me\n")
    done = run_traced(path, "")
    assert (done.returncode, path.read_text()) == (1, "keep me\n")
    assert "the file exists and is not a trace" in done.stderr


def test_a_pipe_gets_line_after_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from katapod.host import trace\ntrace.start_tracing()"],
        env={**os.environ, "KATAPOD_TRACE": "/dev/stdout"},
        capture_output=True,
        timeout=60,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert [json.loads(line.removesuffix(b","))["ph"] for line in lines] == ["M", "X"]


def test_a_file_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trace, "_fd", -1)
    monkeypatch.setenv("KATAPOD_TRACE", str(tmp_path / "none" / "trace.json"))
    with pytest.raises(FileNotFoundError):
        trace.start_tracing()
    assert not trace.enabled()
