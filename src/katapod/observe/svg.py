"""A writer of plain SVG: boxes, arrows and text, all of them with presentation attributes only.

No style sheet, no script, no reference to anything outside, so that a picture may stand inside a web page. Every text
is escaped; what no XML document may hold, and control characters, become a visible sign. Source: SVG 1.1, XML 1.0.
"""

from collections.abc import Sequence

__all__ = ["CHAR_WIDTH", "Canvas", "escape_text", "fit_text"]

CHAR_WIDTH = 0.62  # of a character of the font below, in units of its size: a little more than it has
FONT = "DejaVu Sans Mono, Menlo, Consolas, monospace"
_ESCAPES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;"}


def escape_text(text: str) -> str:
    """For XML text and attribute values."""
    return "".join(_ESCAPES.get(char, char if char.isprintable() else "\N{REPLACEMENT CHARACTER}") for char in text)


def fit_text(text: str, width: float, size: float) -> str:
    """`text`, its middle left out if it has no room in `width`: both ends of a path or an id tell something."""
    room = max(3, int(width / (size * CHAR_WIDTH)))
    if len(text) <= room:
        return text
    head = (room - 1) // 2
    return f"{text[:head]}\N{HORIZONTAL ELLIPSIS}{text[len(text) - (room - 1 - head) :]}"


class Canvas:
    """Collects shapes. Coordinates are pixels, from the upper left corner."""

    def __init__(self) -> None:
        self._shapes: list[str] = []

    def area(self, x: float, y: float, width: float, height: float, title: str, *, fill: str, edge: str) -> None:
        """A big box with its title in the upper left corner; draw it before what is in it."""
        self._box(x, y, width, height, fill, edge, 10)
        self.text(x + 14, y + 22, fit_text(title, width - 28, 13), size=13, fill=edge, bold=True)

    def box(
        self, x: float, y: float, width: float, lines: Sequence[str], *, fill: str = "#ffffff", edge: str = "#4b5563"
    ) -> float:
        """A box with a bold first line and more below; returns its height. What does not fit in is shortened, and can
        be read whole as the box's tooltip."""
        height = 14 + 16 * len(lines)
        self._shapes.append("<g>")
        self._shapes.append(f"<title>{escape_text(' | '.join(lines))}</title>")
        self._box(x, y, width, height, fill, edge, 5)
        for number, line in enumerate(lines):
            size = 12 if number == 0 else 11
            shown = fit_text(line, width - 20, size)
            self.text(x + 10, y + 19 + 16 * number, shown, size=size, bold=number == 0)
        self._shapes.append("</g>")
        return height

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 11,
        fill: str = "#111827",
        bold: bool = False,
        anchor: str = "start",
    ) -> None:
        weight = ' font-weight="bold"' if bold else ""
        self._shapes.append(
            f'<text x="{x:g}" y="{y:g}" font-family="{FONT}" font-size="{size:g}" fill="{fill}" '
            f'text-anchor="{anchor}"{weight}>{escape_text(text)}</text>'
        )

    def line_of_text(self, x: float, y: float, text: str, width: float, *, color: str = "#374151") -> None:
        """Small text in at most `width`; shortened, the whole is its tooltip."""
        self._shapes.append(f"<g><title>{escape_text(text)}</title>")
        self.text(x, y, fit_text(text, width, 11), size=11, fill=color)
        self._shapes.append("</g>")

    def extend(self, other: "Canvas") -> None:
        """Put the shapes of another canvas on top."""
        self._shapes += other._shapes

    def arrow(
        self, x1: float, y1: float, x2: float, y2: float, *, label: str = "", both: bool = False, color: str = "#374151"
    ) -> None:
        """A horizontal or vertical arrow; its label stands above the middle, in as much room as the arrow is long."""
        self._shapes.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{color}" stroke-width="1.5"/>'
        )
        self._head(x1, y1, x2, y2, color)
        if both:
            self._head(x2, y2, x1, y1, color)
        if label:
            shown = fit_text(label, abs(x2 - x1) - 6, 10)
            self.text((x1 + x2) / 2, (y1 + y2) / 2 - 5, shown, size=10, fill=color, anchor="middle")

    def _head(self, x1: float, y1: float, x2: float, y2: float, color: str) -> None:
        length = ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5 or 1.0
        ux, uy = (x2 - x1) / length, (y2 - y1) / length
        points = [
            (x2, y2),
            (x2 - 8 * ux + 4 * uy, y2 - 8 * uy - 4 * ux),
            (x2 - 8 * ux - 4 * uy, y2 - 8 * uy + 4 * ux),
        ]
        shown = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._shapes.append(f'<polygon points="{shown}" fill="{color}"/>')

    def _box(self, x: float, y: float, width: float, height: float, fill: str, edge: str, radius: float) -> None:
        self._shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" '
            f'fill="{fill}" stroke="{edge}" stroke-width="1"/>'
        )

    def render(self, width: float, height: float, title: str) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
            f'width="{width:g}" height="{height:g}" role="img" aria-label="{escape_text(title)}">'
        )
        ground = f'<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>'
        return "\n".join([head, ground, *self._shapes, "</svg>\n"])
