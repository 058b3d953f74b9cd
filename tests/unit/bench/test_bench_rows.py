"""Samples become rows: medians, spreads, ratios taken round by round, budgets."""

import json
from collections.abc import Mapping

import pytest

from bench.rows import Board, Metric, Row, Series, median_and_spread, parse_rows, rows_of

RAW = Metric("raw boot", "s", base=("raw boot", "bzImage"))
START = Metric("start", "s", base=("raw boot", "bzImage"), budgets={"us": 0.5}, against={"us": ("runsc", 5.0)})
SIZE = Metric("size", "MiB", budgets={"us": 160})


def series(metric: Metric, contestant: str, samples: Mapping[int, float]) -> Series:
    return Series("group", metric, contestant, samples)


def rows(*found: Series) -> dict[str, Row]:
    return {row.name: row for row in rows_of(found, ["runsc"])}


def test_median_and_spread() -> None:
    assert median_and_spread([3.0, 1.0, 10.0]) == (3.0, 2.0)
    assert median_and_spread([1.0, 2.0]) == (1.5, 0.5)


def test_one_value_has_no_spread() -> None:
    assert median_and_spread([7.0]) == (7.0, None)


def test_no_value_has_no_median() -> None:
    with pytest.raises(ValueError, match="needs a value"):
        median_and_spread([])


def test_a_ratio_is_taken_within_each_round() -> None:
    """The machine was twice as slow in round 1; the ratio of the medians would be 3 / 6."""
    found = rows(series(RAW, "bzImage", {0: 4.0, 1: 8.0}), series(START, "us", {0: 1.0, 1: 2.0}))
    assert found["start, us"].ratio == 0.25
    assert found["start, us"].ratio_spread == 0.0
    assert found["start, us"].value == 1.5
    assert found["start, us"].base == "raw boot, bzImage"


def test_a_round_without_its_base_does_not_count_for_the_ratio() -> None:
    found = rows(series(RAW, "bzImage", {1: 4.0}), series(START, "us", {0: 100.0, 1: 1.0}))
    assert found["start, us"].ratio == 0.25
    assert found["start, us"].samples == 2


def test_without_a_shared_round_the_medians_are_compared() -> None:
    found = rows(series(RAW, "bzImage", {0: 4.0}), series(START, "us", {1: 1.0}))
    assert (found["start, us"].ratio, found["start, us"].ratio_spread) == (0.25, None)


def test_without_a_base_there_is_no_ratio_and_no_verdict() -> None:
    row = rows(series(START, "us", {0: 1.0}))["start, us"]
    assert (row.ratio, row.budget, row.within) == (None, 0.5, None)


def test_a_base_of_zero_gives_no_ratio() -> None:
    found = rows(series(RAW, "bzImage", {0: 0.0}), series(START, "us", {0: 1.0}))
    assert found["start, us"].ratio is None


@pytest.mark.parametrize(("value", "within"), [(1.9, True), (2.0, True), (2.1, False)])
def test_a_budget_is_for_the_ratio(value: float, within: bool) -> None:
    found = rows(series(RAW, "bzImage", {0: 4.0}), series(START, "us", {0: value}))
    assert found["start, us"].within is within


@pytest.mark.parametrize(("value", "within"), [(160.0, True), (161.0, False)])
def test_a_budget_without_base_is_for_the_value(value: float, within: bool) -> None:
    assert rows(series(SIZE, "us", {0: value}))["size, us"].within is within


def test_who_has_no_budget_has_no_verdict() -> None:
    found = rows(series(RAW, "bzImage", {0: 4.0}), series(START, "runsc", {0: 9.0}))
    assert (found["start, runsc"].budget, found["start, runsc"].within) == (None, None)


def test_peers_and_the_aim_against_one() -> None:
    found = rows(
        series(RAW, "bzImage", {0: 4.0}), series(START, "runsc", {0: 0.25}), series(START, "us", {0: 1.5, 1: 9.0})
    )
    assert found["start, us"].peers == {"runsc": 6.0}
    assert found["start, runsc"].peers == {}
    against = found["start, against runsc, us"]
    assert (against.ratio, against.budget, against.within, against.base_shown) == (6.0, 5.0, False, "runsc")
    assert found["start, us"].base_shown == "raw boot"


def test_a_missing_peer_gives_no_row() -> None:
    assert list(rows(series(START, "us", {0: 1.0}))) == ["start, us"]


def test_a_series_without_samples_gives_no_row() -> None:
    assert rows(series(SIZE, "us", {})) == {}


def test_the_board_keeps_the_order_of_first_appearance() -> None:
    board = Board()
    for number in range(2):
        board.record("g", SIZE, "us", number, 1.0 + number)
        board.record("g", SIZE, "runsc", number, 5.0)
    assert [(one.name, one.samples) for one in board.series()] == [
        ("size, us", {0: 1.0, 1: 2.0}),
        ("size, runsc", {0: 5.0, 1: 5.0}),
    ]


def test_rows_survive_the_file() -> None:
    found = list(rows(series(RAW, "bzImage", {0: 4.0, 1: 5.0}), series(START, "us", {0: 1.0, 1: 2.0})).values())
    as_list = json.dumps([row.to_json() for row in found])
    assert parse_rows(as_list) == found
    assert parse_rows(f'{{"machine": {{}}, "rows": {as_list}}}') == found
    assert {"name", "value", "unit", "ratio", "budget"} <= set(json.loads(as_list)[0])


GOOD = {"name": "a", "value": 1, "unit": "s", "ratio": None, "budget": None}


def test_five_keys_are_enough_and_unknown_ones_are_passed_over() -> None:
    assert parse_rows(json.dumps([GOOD | {"colour": "blue"}])) == [Row("a", 1, "s")]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "Expecting"),
        ('"rows"', "expected a list"),
        ('{"machine": {}}', "expected a list"),
        ("[1]", "row 0: expected an object"),
        ('[{"name": "a", "value": 1, "unit": "s"}]', "row 0: has no ratio, budget"),
        (json.dumps([GOOD | {"name": 1}]), "name and unit must be strings"),
        (json.dumps([GOOD | {"value": None}]), "value must be a number"),
        (json.dumps([GOOD | {"value": True}]), "value must be a number"),
        (json.dumps([GOOD | {"ratio": "0.5"}]), "ratio must be a number"),
        (json.dumps([GOOD | {"better": "bigger"}]), "better must be"),
        (json.dumps([GOOD, GOOD]), "there twice"),
    ],
)
def test_what_is_no_result_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse_rows(text)
