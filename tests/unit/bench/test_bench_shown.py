"""Charts and tables: well-formed, complete, and of the right proportions."""

import io
import re
from xml.etree import ElementTree

import pytest
from rich.console import Console

from bench.plots import LABELS, chart
from bench.rows import Row
from bench.table import print_results, shown_number

SVG = "{http://www.w3.org/2000/svg}"


def row(metric: str, who: str, value: float, spread: float | None = None, **more: float) -> Row:
    return Row(
        f"{metric}, {who}",
        value,
        "s",
        spread=spread,
        metric=metric,
        contestant=who,
        group="g",
        budget=more.get("budget"),
    )


def bars(root: ElementTree.Element) -> list[float]:
    return [float(rect.get("width", "")) for rect in root.iter(f"{SVG}rect")][1:]  # the first is the background


def test_bars_are_proportional_within_a_metric() -> None:
    rows = [row("start", "us", 2.0), row("start", "them", 1.0), row("files", "us", 50.0)]
    root = ElementTree.fromstring(chart("title", rows, []))
    us, them, other = bars(root)
    assert us == pytest.approx(2 * them)
    assert other == pytest.approx(us)  # each metric has a scale of its own


def test_names_values_and_spreads_are_there() -> None:
    root = ElementTree.fromstring(chart("title", [row("start", "us", 2.0, 0.5)], ["machine"]))
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"title", "start", "us", "2.00 ±0.50 s", "machine"} <= set(texts)
    whiskers = [path.get("d", "") for path in root.iter(f"{SVG}path") if "v8" in path.get("d", "")]
    assert len(whiskers) == 1


def test_a_whisker_does_not_leave_the_axis_or_the_picture() -> None:
    root = ElementTree.fromstring(chart("title", [row("start", "us", 1.0, 3.0)], []))
    (whisker,) = (path.get("d", "") for path in root.iter(f"{SVG}path") if "v8" in path.get("d", ""))
    low, high = re.findall(r"M([\d.]+) ", whisker)[0], re.findall(r"H([\d.]+)", whisker)[0]
    assert LABELS <= float(low) < float(high) <= float(root.get("width", ""))


def test_names_are_escaped() -> None:
    root = ElementTree.fromstring(chart("a < b & c", [row("<m>", '"who"', 1.0)], ["&"]))
    assert root.findtext(f"{SVG}title") == "a < b & c"


def test_metrics_without_any_value_are_left_out() -> None:
    root = ElementTree.fromstring(chart("title", [row("failures", "us", 0.0), row("start", "us", 1.0)], []))
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert "start" in texts
    assert "failures" not in texts


def test_a_chart_of_nothing_is_well_formed() -> None:
    assert bars(ElementTree.fromstring(chart("title", [], []))) == []


@pytest.mark.parametrize(
    ("value", "spread", "text"),
    [
        (None, None, ""),
        (0.0, None, "0.00"),
        (0.01234, 0.0011, "0.012 ±0.001"),
        (1.234, 0.5, "1.23 ±0.50"),
        (12.34, None, "12.3"),
        (1234.5, 10.0, "1,234 ±10"),
    ],
)
def test_numbers(value: float | None, spread: float | None, text: str) -> None:
    assert shown_number(value, spread) == text


def test_the_table_groups_by_metric_and_says_what_is_over() -> None:
    """Rows of a metric stand together, whatever the order in which they were measured."""
    rows = [
        row("start", "us", 2.0, budget=1.0),
        row("files", "us", 1.0, budget=1.0),
        row("start", "them", 3.0),
    ]
    out = io.StringIO()
    print_results(rows, {"g": "the title", "empty": "never shown"}, Console(file=out, width=120))
    lines = [line.split() for line in out.getvalue().splitlines() if line.strip()]
    assert lines[0] == ["the", "title"]
    assert ["start", "us", "2.00", "s", "1", "over"] in lines
    assert lines.index(["them", "3.00", "s"]) == lines.index(["start", "us", "2.00", "s", "1", "over"]) + 1
    assert ["files", "us", "1.00", "s", "1", "within"] in lines
    assert "never" not in out.getvalue()
