"""A run beside the baseline: what is noise, what is not, and which way is better."""

import json
import sys
from pathlib import Path

import pytest

from bench.compare import compare_rows, main
from bench.rows import Row


def row(
    ratio: float | None, spread: float | None, *, value: float = 1.0, base: str | None = "raw", more: bool = False
) -> Row:
    return Row(
        "a", value, "s", ratio, None, spread, spread if ratio is not None else None, base, "more" if more else "less"
    )


@pytest.mark.parametrize(
    ("before", "now", "verdict"),
    [
        (row(1.0, 0.01), row(1.2, 0.01), "worse"),
        (row(1.0, 0.01), row(0.8, 0.01), "better"),
        (row(1.0, 0.01, more=True), row(1.2, 0.01, more=True), "better"),
        (row(1.0, 0.01, more=True), row(0.8, 0.01, more=True), "worse"),
        (row(1.0, 0.1), row(1.2, 0.1), "noise"),
        (row(1.0, 0.1), row(1.2, None), "spread unknown"),
        (row(1.0, None), row(1.0, None), "noise"),
        (row(0.0, None), row(1.0, None), "spread unknown"),
    ],
)
def test_verdicts(before: Row, now: Row, verdict: str) -> None:
    (change,) = compare_rows([before], [now])
    assert (change.verdict, change.by) == (verdict, "ratio")


def test_noise_is_what_both_spreads_explain() -> None:
    (change,) = compare_rows([row(1.0, 0.03)], [row(1.2, 0.04)])
    assert change.noise == pytest.approx(3 * 1.4826 * 0.05)
    assert change.percent == pytest.approx(20)


def test_a_faster_machine_is_no_improvement() -> None:
    (change,) = compare_rows([row(0.5, 0.01, value=4.0)], [row(0.5, 0.01, value=2.0)])
    assert (change.verdict, change.percent) == ("noise", 0)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (row(None, 0.01, value=100.0), row(None, 0.01, value=120.0)),
        (row(2.0, 0.01, value=100.0), row(None, 0.01, value=120.0)),
        (row(2.0, 0.01, value=100.0, base="other"), row(2.0, 0.01, value=120.0)),
        (row(1.0, 0.01, value=100.0, base="a"), row(1.0, 0.01, value=120.0, base="a")),  # its own base: always 1
    ],
)
def test_without_a_common_base_values_are_compared(before: Row, now: Row) -> None:
    (change,) = compare_rows([before], [now])
    assert (change.by, change.before, change.now, change.verdict) == ("value", 100.0, 120.0, "worse")


def test_new_and_gone() -> None:
    changes = compare_rows([Row("old", 1.0, "s"), Row("both", 1.0, "s")], [Row("new", 2.0, "s"), Row("both", 1.0, "s")])
    assert [(change.name, change.verdict) for change in changes] == [("new", "new"), ("both", "noise"), ("old", "gone")]


def run(monkeypatch: pytest.MonkeyPatch, baseline: Path, current: Path) -> int:
    monkeypatch.setattr(sys, "argv", ["compare", "--baseline", str(baseline), "--run", str(current)])
    return main()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A large change for the worse is reported, and is no failure; both machines are named."""
    baseline, current = tmp_path / "baseline.json", tmp_path / "bench.json"
    baseline.write_text(json.dumps({"machine": {"cpu": "Old CPU"}, "rows": [row(1.0, 0.01).to_json()]}))
    current.write_text(json.dumps([row(9.0, 0.01).to_json()]))
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "machine.json").write_text(json.dumps({"machine": {"cpu": "New CPU"}}))
    assert run(monkeypatch, baseline, current) == 0
    out = capsys.readouterr().out
    assert "baseline: cpu: Old CPU" in out
    assert "this run: cpu: New CPU" in out
    assert "+800 %" in out
    assert "0 better, 1 worse, 0 within noise, of 1 rows" in out


@pytest.mark.parametrize("content", [None, "", "[{}]"])
def test_unreadable_input_fails(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline, current = tmp_path / "baseline.json", tmp_path / "bench.json"
    baseline.write_text("[]")
    if content is not None:
        current.write_text(content)
    assert run(monkeypatch, baseline, current) == 1
    assert "cannot read the results" in capsys.readouterr().err
