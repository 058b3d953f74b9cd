"""Draw a trace of KATAPOD_TRACE as one picture: host and guest on one time line, as an SVG.

    KATAPOD_TRACE=/tmp/trace.json kata-runtime run --rm busybox true
    .venv/bin/python bench/timeline.py /tmp/trace.json docs/performance.svg

The trace itself opens in Perfetto or chrome://tracing; the picture is for documents.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import msgspec

WIDTH, LEFT, RIGHT, ROW, TOP = 1180, 96, 150, 20, 46
GRID_MS = 100.0
LABEL_CHAR = 6.1  # pixels of a character at 11 px
COLOURS = {"host": "#3b6ea5", "QEMU": "#8a5a9e", "virtiofsd": "#5b8c5a", "memory": "#b8860b", "guest": "#b5533c"}
HIDDEN_BELOW_MS = 0.3


@dataclass(frozen=True, slots=True)
class Bar:
    track: str
    name: str
    start_ms: float
    length_ms: float

    @property
    def end_ms(self) -> float:
        return self.start_ms + self.length_ms


def read_trace(text: str) -> list[Bar]:
    """The spans of one run, by start. A guest's spans from before the run (its template's boot) are left out.

    Raises msgspec.DecodeError for what is no trace, ValueError for one without spans.
    """
    events = msgspec.json.decode(text.strip().removesuffix(",") + "]", type=list[dict[str, object]])
    tracks = {(e["pid"], e["tid"]): str(e["args"]["name"]) for e in events if e["ph"] == "M"}  # type: ignore[index]
    spans = [(tracks[e["pid"], e["tid"]], e) for e in events if e["ph"] == "X"]
    if not spans:
        raise ValueError("the trace has no spans")
    begin = min(_number(e["ts"]) for track, e in spans if track != "guest")
    bars = [
        Bar(track, str(e["name"]), (_number(e["ts"]) - begin) / 1000, _number(e["dur"]) / 1000) for track, e in spans
    ]
    return sorted((bar for bar in bars if bar.start_ms >= 0), key=lambda bar: (bar.start_ms, -bar.length_ms))


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)


def lay_out(bars: Iterable[Bar]) -> list[tuple[int, Bar]]:
    """Give each bar a row: the first of its track that is free from its start on, label included."""
    rows: list[tuple[str, float]] = []  # track, free from
    placed = []
    for bar in bars:
        if bar.length_ms < HIDDEN_BELOW_MS:
            continue
        fitting = (i for i, (track, free_ms) in enumerate(rows) if track == bar.track and free_ms <= bar.start_ms)
        number = next(fitting, len(rows))
        if number == len(rows):
            rows.append((bar.track, 0.0))
        rows[number] = (bar.track, bar.end_ms)
        placed.append((number, bar))
    order = sorted(range(len(rows)), key=lambda number: (list(COLOURS).index(rows[number][0]), number))
    place = {number: index for index, number in enumerate(order)}
    return [(place[number], bar) for number, bar in placed]


def draw(bars: list[Bar], title: str) -> str:
    placed = lay_out(bars)
    end_ms = max(bar.end_ms for _, bar in placed)
    scale = (WIDTH - LEFT - RIGHT) / end_ms
    height = TOP + ROW * (1 + max(row for row, _ in placed)) + 24
    head = f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="11"'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {head}>',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="20" font-size="14" fill="#222">{escape(title)}</text>',
    ]
    for step in range(int(end_ms / GRID_MS) + 1):
        x = LEFT + step * GRID_MS * scale
        out.append(f'<line x1="{x:.1f}" y1="{TOP - 6}" x2="{x:.1f}" y2="{height - 20}" stroke="#e0e0e0"/>')
        out.append(f'<text x="{x:.1f}" y="{height - 6}" text-anchor="middle" fill="#666">{step * GRID_MS:g} ms</text>')
    named: set[str] = set()
    in_order = sorted(placed, key=lambda item: (item[0], item[1].start_ms))
    for (row, bar), (next_row, following) in zip(in_order, [*in_order[1:], (-1, bars[0])], strict=True):
        room = ((following.start_ms if next_row == row else end_ms) - bar.end_ms) * scale
        out += _bar(row, bar, scale, room=room + (0 if next_row == row else RIGHT), first=bar.track not in named)
        named.add(bar.track)
    return "\n".join([*out, "</svg>"]) + "\n"


def _bar(row: int, bar: Bar, scale: float, *, room: float, first: bool) -> list[str]:
    """`room`: pixels to the right of the bar that nothing else needs."""
    x, y = LEFT + bar.start_ms * scale, TOP + row * ROW
    width = max(1.0, bar.length_ms * scale)
    label = f"{bar.name} {bar.length_ms:.0f}"
    box = f'x="{x:.1f}" y="{y}" width="{width:.1f}" height="{ROW - 4}" rx="2" fill="{COLOURS[bar.track]}"'
    name = f'<text x="8" y="{y + 12}" fill="{COLOURS[bar.track]}" font-weight="bold">{bar.track}</text>'
    mark = [name] if first else []
    lines = [f"<rect {box}><title>{escape(label)} ms</title></rect>"]
    for size in (11, 9):
        if width > len(label) * LABEL_CHAR * size / 11:
            where = f'x="{x + 3:.1f}" y="{y + 12}" fill="#fff" font-size="{size}"'
            return [*lines, *mark, f"<text {where}>{escape(label)}</text>"]
    if room > len(label) * LABEL_CHAR * 0.85:
        lines.append(f'<text x="{x + width + 3:.1f}" y="{y + 12}" fill="#333" font-size="9">{escape(label)}</text>')
    return [*lines, *mark]


def main() -> int:
    if len(sys.argv) not in (3, 4):
        print("usage: timeline.py TRACE.json PICTURE.svg [TITLE]", file=sys.stderr)
        return 2
    try:
        bars = read_trace(Path(sys.argv[1]).read_text())
    except (OSError, ValueError) as exc:
        print(f"timeline: cannot draw {sys.argv[1]}: {exc}", file=sys.stderr)
        return 1
    Path(sys.argv[2]).write_text(draw(bars, sys.argv[3] if len(sys.argv) == 4 else "kata-runtime run, milliseconds"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
