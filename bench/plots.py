"""Bar charts as SVG: one panel for each metric, one bar for each contestant, its spread as a whisker."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from bench.rows import Row
from bench.table import shown_number

__all__ = ["chart"]

WIDTH, LABELS, FIGURES = 820, 175, 235  # pixels: in all, left of the bars, right of them
BAR, GAP, HEAD, FOOT = 16, 7, 34, 30
NOTE_LETTERS = 125  # of the small print, in a line
OURS, THEIRS, RAW = "#1f6fb2", "#a3acb5", "#d8a24a"
STYLE = (
    "text{font-family:Helvetica,Arial,sans-serif;font-size:12px;fill:#222}"
    ".t{font-size:15px;font-weight:bold}.m{font-weight:bold}.n{font-size:10px;fill:#666}"
)


@dataclass(frozen=True, slots=True)
class _Panel:
    metric: str
    rows: Sequence[Row]

    @property
    def height(self) -> int:
        return HEAD + len(self.rows) * (BAR + GAP) + GAP


def _colour(row: Row) -> str:
    if row.contestant.startswith("Katapod"):
        return OURS
    return RAW if row.group == "boot" else THEIRS


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{attribute}>{escape(text)}</text>'


def _bar(row: Row, y: float, scale: float) -> list[str]:
    """`scale`: pixels a unit."""
    length = max(row.value * scale, 1.0)
    middle = y + BAR / 2
    parts = [
        _text(LABELS - 8, y + BAR - 4, row.contestant, anchor="end"),
        f'<rect x="{LABELS}" y="{y:.1f}" width="{length:.1f}" height="{BAR}" fill="{_colour(row)}"/>',
    ]
    end = length
    if row.spread:
        low, high = max(row.value - row.spread, 0.0) * scale, (row.value + row.spread) * scale
        end = max(end, high)
        parts.append(
            f'<path d="M{LABELS + low:.1f} {middle:.1f}H{LABELS + high:.1f}M{LABELS + low:.1f} {middle - 4:.1f}v8'
            f'M{LABELS + high:.1f} {middle - 4:.1f}v8" stroke="#222" fill="none"/>'
        )
    figure = f"{shown_number(row.value, row.spread)} {row.unit}"
    if row.ratio is not None and row.base != row.name and row.base is not None:
        figure += f"  ({shown_number(row.ratio)} x {row.base_shown})"
    parts.append(_text(LABELS + end + 6, y + BAR - 4, figure))
    return parts


def _draw(panel: _Panel, top: float) -> list[str]:
    most = max(row.value + (row.spread or 0.0) for row in panel.rows)
    scale = (WIDTH - LABELS - FIGURES) / most if most > 0 else 0.0
    better = "more is better" if panel.rows[0].better == "more" else "less is better"
    parts = [
        _text(12, top + 20, panel.metric, "m"),
        _text(WIDTH - 12, top + 20, f"{panel.rows[0].unit}, {better}", "n", "end"),
    ]
    for index, row in enumerate(panel.rows):
        parts += _bar(row, top + HEAD + index * (BAR + GAP), scale)
    bottom = top + panel.height - GAP
    parts.append(f'<path d="M{LABELS} {top + HEAD - 4:.1f}V{bottom:.1f}" stroke="#888" fill="none"/>')
    return parts


def chart(title: str, rows: Sequence[Row], footer: Sequence[str]) -> str:
    """An SVG document. Metrics whose values are all 0 are left out; without any other there is an empty chart."""
    metrics = dict.fromkeys(row.metric for row in rows)
    panels = [_Panel(metric, [row for row in rows if row.metric == metric]) for metric in metrics]
    panels = [panel for panel in panels if any(row.value > 0 for row in panel.rows)]
    whiskers = "Bars are medians; whiskers are the median absolute deviation."
    notes = [part for line in (whiskers, *footer) for part in textwrap.wrap(line, NOTE_LETTERS)]
    height = 40 + sum(panel.height for panel in panels) + FOOT + 13 * (len(notes) - 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}">',
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        _text(12, 26, title, "t"),
    ]
    top = 40.0
    for panel in panels:
        parts += _draw(panel, top)
        top += panel.height
    for index, line in enumerate(notes):
        parts.append(_text(12, top + 20 + 13 * index, line, "n"))
    return "\n".join([*parts, "</svg>", ""])
