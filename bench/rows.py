"""Pure: from samples to rows.

A series is what one contestant did in one metric, one figure a round. Ratios are taken within a round and then
their median, so that a machine that slows down during the run slows both sides of a ratio.
"""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

__all__ = ["Board", "Metric", "Row", "Series", "median_and_spread", "parse_rows", "rows_of", "versus_row"]

Better = Literal["less", "more"]
REQUIRED = ("name", "value", "unit", "ratio", "budget")


@dataclass(frozen=True, slots=True)
class Metric:
    """What is measured. `base` is the series that the ratio is to: (title, contestant), a title of "" being this one's.

    `budgets` holds for each contestant the most (the least, where more is better) that the ratio may be; the value,
    where there is no base. `against` are further aims: contestant -> (peer, the same for the ratio to the peer's).
    """

    title: str
    unit: str
    base: tuple[str, str] | None = None
    better: Better = "less"
    budgets: Mapping[str, float] = field(default_factory=dict)
    against: Mapping[str, tuple[str, float]] = field(default_factory=dict)

    def base_name(self) -> str | None:
        return None if self.base is None else f"{self.base[0] or self.title}, {self.base[1]}"


@dataclass(frozen=True, slots=True)
class Series:
    """The samples of one contestant in one metric: round -> value. A round that failed is not there."""

    group: str
    metric: Metric
    contestant: str
    samples: Mapping[int, float]

    @property
    def name(self) -> str:
        return f"{self.metric.title}, {self.contestant}"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result.

    `ratio` is value / base's value, `spread` and `ratio_spread` are median absolute deviations. `peers` are the ratios
    to each peer in the same metric.
    """

    name: str
    value: float
    unit: str
    ratio: float | None = None
    budget: float | None = None
    spread: float | None = None
    ratio_spread: float | None = None
    base: str | None = None
    better: Better = "less"
    samples: int = 1
    group: str = ""
    metric: str = ""
    contestant: str = ""
    peers: Mapping[str, float] = field(default_factory=dict)

    @property
    def within(self) -> bool | None:
        """Whether the budget is kept; None if there is none, or nothing to compare it with."""
        measured = self.ratio if self.base is not None else self.value
        if self.budget is None or measured is None:
            return None
        return measured <= self.budget if self.better == "less" else measured >= self.budget

    @property
    def base_shown(self) -> str:
        """The base, for people: its contestant if it is in the same metric, else its metric."""
        metric, _, contestant = (self.base or "").rpartition(", ")
        return contestant if metric == self.metric.partition(", against ")[0] else metric

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Board:
    """Collects the samples of a run, in the order in which series first appear."""

    def __init__(self) -> None:
        self._series: dict[str, tuple[str, Metric, str, dict[int, float]]] = {}

    def record(self, group: str, metric: Metric, contestant: str, number: int, value: float) -> None:
        name = f"{metric.title}, {contestant}"
        self._series.setdefault(name, (group, metric, contestant, {}))[3][number] = value

    def series(self) -> list[Series]:
        return [Series(*parts) for parts in self._series.values()]


def median_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Median and median absolute deviation; one value alone has no spread. Raises ValueError if there is none."""
    if not values:
        raise ValueError("a median needs a value")
    middle = statistics.median(values)
    if len(values) == 1:
        return middle, None
    return middle, statistics.median(abs(value - middle) for value in values)


def _ratios(series: Series, base: Series | None) -> list[float]:
    """Round by round; where the two share no round, the ratio of the medians."""
    if base is None or not base.samples:
        return []
    shared = [
        value / base.samples[number] for number, value in series.samples.items() if base.samples.get(number, 0.0) > 0
    ]
    if shared:
        return shared
    below = statistics.median(base.samples.values())
    return [statistics.median(series.samples.values()) / below] if below > 0 else []


def rows_of(series: Iterable[Series], peers: Sequence[str]) -> list[Row]:
    """One row for each series, and one for each aim against a peer; series without samples give none."""
    known = {one.name: one for one in series}
    rows = []
    for one in known.values():
        if not one.samples:
            continue
        metric = one.metric
        value, spread = median_and_spread(list(one.samples.values()))
        base = metric.base_name()
        ratios = _ratios(one, known.get(base)) if base is not None else []
        ratio, ratio_spread = median_and_spread(ratios) if ratios else (None, None)
        beside = {
            peer: statistics.median(found)
            for peer in peers
            if peer != one.contestant and (found := _ratios(one, known.get(f"{metric.title}, {peer}")))
        }
        rows.append(
            Row(
                name=one.name,
                value=value,
                unit=metric.unit,
                ratio=ratio,
                budget=metric.budgets.get(one.contestant),
                spread=spread,
                ratio_spread=ratio_spread,
                base=base,
                better=metric.better,
                samples=len(one.samples),
                group=one.group,
                metric=metric.title,
                contestant=one.contestant,
                peers=beside,
            )
        )
        if aim := metric.against.get(one.contestant):
            peer, budget = aim
            rows += versus_row(one, known.get(f"{metric.title}, {peer}"), budget)
    return rows


def versus_row(series: Series, peer: Series | None, budget: float) -> list[Row]:
    """How many times the peer's figure it is: a row of its own, since it has a budget of its own."""
    ratios = _ratios(series, peer)
    if peer is None or not ratios:
        return []
    ratio, spread = median_and_spread(ratios)
    title = f"{series.metric.title}, against {peer.contestant}"
    return [
        Row(
            name=f"{title}, {series.contestant}",
            value=ratio,
            unit=f"x {peer.contestant}",
            ratio=ratio,
            budget=budget,
            spread=spread,
            ratio_spread=spread,
            base=peer.name,
            better=series.metric.better,
            samples=len(ratios),
            group=series.group,
            metric=title,
            contestant=series.contestant,
        )
    ]


def parse_rows(text: str) -> list[Row]:
    """Read what a run wrote: a list of rows, or an object whose `rows` is one. Raises ValueError, saying what is wrong.

    Keys beyond the five that every row has may be missing; keys that nobody knows are passed over.
    """
    found = json.loads(text)
    if isinstance(found, dict):
        found = found.get("rows")
    if not isinstance(found, list):
        raise ValueError("expected a list of rows")
    rows, names = [], set()
    for index, item in enumerate(found):
        if not isinstance(item, dict):
            raise ValueError(f"row {index}: expected an object")
        if lacking := [key for key in REQUIRED if key not in item]:
            raise ValueError(f"row {index}: has no {', '.join(lacking)}")
        if not isinstance(item["name"], str) or not isinstance(item["unit"], str):
            raise ValueError(f"row {index}: name and unit must be strings")
        for key in ("value", "ratio", "budget", "spread", "ratio_spread"):
            optional = key != "value"
            number = item.get(key)
            if not (optional and number is None) and (isinstance(number, bool) or not isinstance(number, int | float)):
                raise ValueError(f"row {index} ({item['name']}): {key} must be a number")
        if item.get("better", "less") not in ("less", "more"):
            raise ValueError(f"row {index} ({item['name']}): better must be less or more")
        if item["name"] in names:
            raise ValueError(f"row {index}: {item['name']} is there twice")
        names.add(item["name"])
        rows.append(Row(**{key: value for key, value in item.items() if key in Row.__dataclass_fields__}))
    return rows
