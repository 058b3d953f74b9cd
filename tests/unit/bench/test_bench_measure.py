"""Times and ends of real processes: short ones of the host's shell."""

import os
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import measure
from bench.measure import BenchError, execute, run_at_once


def sh(script: str, *arguments: str) -> list[str]:
    return ["sh", "-c", script, "sh", *arguments]


def test_output_is_taken_line_by_line_and_the_end_after_it() -> None:
    outcome = execute(sh("echo one; printf 'two\\r\\nthree'"))
    assert [text for _, text in outcome.lines] == ["one", "two", "three"]
    assert 0 < outcome.first_s <= outcome.until("three") <= outcome.end_s


def test_a_line_that_never_came() -> None:
    with pytest.raises(BenchError, match="never wrote 'end'"):
        execute(sh("echo begin")).until("end")


def test_a_failure_says_what_was_said() -> None:
    with pytest.raises(BenchError, match="status 3; the reason"):
        execute(sh("echo the reason >&2; exit 3"))


def test_a_warning_breaks_nothing() -> None:
    outcome = execute(sh("echo a warning >&2; echo fine"))
    assert (outcome.good, outcome.errors) == (True, "a warning\n")


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(BenchError, match="cannot start /nowhere/program"):
        execute(["/nowhere/program"])


def test_failures_do_not_stop_the_others() -> None:
    good, bad = run_at_once([sh("echo fine"), sh("exit 1")])
    assert (good.good, bad.good, bad.status) == (True, False, 1)


def test_all_at_once_meet(tmp_path: Path) -> None:
    """Each opens a FIFO that the other opens at its other end: one after the other, they would wait for ever."""
    os.mkfifo(tmp_path / "fifo")
    reader, writer = run_at_once(
        [sh('cat "$1"', str(tmp_path / "fifo")), sh('echo met > "$1"', str(tmp_path / "fifo"))]
    )
    assert (reader.lines[0][1], writer.status) == ("met", 0)


def test_in_one_lane_the_next_starts_after_the_end(tmp_path: Path) -> None:
    script = 'mkdir "$1/busy" && echo alone && rmdir "$1/busy"'
    outcomes = run_at_once([sh(script, str(tmp_path))] * 4, lanes=1)
    assert [outcome.good for outcome in outcomes] == [True] * 4
    assert all(one.began + one.end_s <= other.began for one, other in pairwise(outcomes))


def test_who_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trap shows that it was asked first. The limit is over once that is set."""
    script = 'cd "$1"; trap "touch asked; exit 9" TERM; : > up; echo up; while :; do read line < fifo; done'
    os.mkfifo(tmp_path / "fifo")
    clock = SimpleNamespace(monotonic=lambda: 2000.0 if (tmp_path / "up").exists() else 0.0)
    monkeypatch.setattr(measure, "time", clock)
    (outcome,) = run_at_once([sh(script, str(tmp_path))], limit_s=1000.0)
    assert (outcome.status, outcome.good) == (None, False)
    assert (tmp_path / "asked").exists()
    with pytest.raises(BenchError, match="did not end"):
        outcome.end_s  # noqa: B018


def test_what_a_command_leaves_running_is_not_waited_for(tmp_path: Path) -> None:
    """A child keeps the output open for as long as it waits for its FIFO."""
    os.mkfifo(tmp_path / "fifo")
    outcome = execute(sh('cat "$1" & echo started', str(tmp_path / "fifo")))
    assert [text for _, text in outcome.lines] == ["started"]
    os.close(os.open(tmp_path / "fifo", os.O_WRONLY))
