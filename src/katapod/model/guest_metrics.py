"""What a guest says of itself as Prometheus text: bounded, then kept line by line. Pure.

One malformed line, a second TYPE of a name, or a label that kata-monitor sets itself would cost Prometheus the
scrape of all sandboxes. Each step is linear in the text, and no text makes an expression here try twice at one place: a
guest chooses the worst there is.
Source: the Prometheus text exposition format, version 0.0.4.
"""

import re

from katapod.model.plain import plain
from katapod.model.summary import GuestSummary

__all__ = ["LINES_MAX", "LINE_MAX", "OUTER_LABELS", "TEXT_MAX", "guest_metrics", "guest_summary"]

TEXT_MAX = 512 << 10  # characters; a guest of ours says some 15 KiB
LINES_MAX = 5000  # a guest of ours says some 330
LINE_MAX = 1024  # characters
OUTER_LABELS = frozenset(("sandbox_id", "cri_uid", "cri_name", "cri_namespace"))  # kata-monitor's to set
_NUMBER = r"(?:[-+]?(?:(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][-+]?[0-9]++)?|Inf)|NaN)"
_LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*+="(?:[^"\\]|\\[\\"n])*+"'
_NAME = r"kata_(?:agent|guest)_[a-zA-Z0-9_]*+"
_HEAD = re.compile(
    rf"# (?:(HELP) ({_NAME}) (?:[^\\]|\\[\\n])*+|(TYPE) ({_NAME}) (?:counter|gauge|histogram|summary|untyped))"
)
_SAMPLE = re.compile(rf"({_NAME})(?:\{{({_LABEL}(?:,{_LABEL})*+)?\}})? {_NUMBER}")
_LABEL_NAME = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*+)="(?:[^"\\]|\\.)*+",?')
_FOREIGN = re.compile(r"(# (?:HELP|TYPE) )?((?:go|process)_.*)", re.DOTALL)
_SUMMARY_LINE = re.compile(
    rf'kata_guest_(meminfo|load|tasks)\{{item="(mem_total|mem_available|load1|max)"\}} ({_NUMBER})', re.ASCII
)
_SUMMARY_FIELDS = {"mem_total": "memory_total", "mem_available": "memory_available", "load1": "load1", "max": "tasks"}


def guest_metrics(text: str) -> tuple[str, bool]:
    """Those lines that are the guest's to say, up to the limits, and whether a limit cut some off.

    The names go_ and process_ get the prefix that kata-monitor gives them.
    """
    lines = text[:TEXT_MAX].split("\n", LINES_MAX)
    cut = len(text) > TEXT_MAX or len(lines) > LINES_MAX
    if cut:
        lines.pop()  # it may be half a line, or all the rest
    kept: list[str] = []
    known: set[tuple[str, str]] = set()
    for line in lines:
        if len(line) > LINE_MAX:
            continue
        if foreign := _FOREIGN.fullmatch(line):
            line = f"{foreign[1] or ''}kata_agent_{foreign[2]}"
        if not line.isprintable():  # in a label's value or a HELP a backslash stands for one
            line = "".join(char if char.isprintable() else f"\\{plain(char)}" for char in line)
        if _is_good(line, known):
            kept.append(f"{line}\n")
    return "".join(kept), cut


def _is_good(line: str, known: set[tuple[str, str]]) -> bool:
    """`known` are the HELP and TYPE lines so far; for a TYPE it is too late once there is a sample."""
    if match := _HEAD.fullmatch(line):
        head = (match[1] or match[3], match[2] or match[4])
        is_first = head not in known
        known.add(head)
        return is_first
    match = _SAMPLE.fullmatch(line)
    if match is None:
        return False
    known.add(("TYPE", match[1]))
    names = _LABEL_NAME.findall(match[2] or "")
    return len(names) == len(set(names)) and OUTER_LABELS.isdisjoint(names)


def guest_summary(text: str) -> GuestSummary | None:
    """From what guest_metrics has let through; None if the guest told nothing."""
    found = {
        _SUMMARY_FIELDS[match[2]]: float(match[3]) for match in map(_SUMMARY_LINE.fullmatch, text.splitlines()) if match
    }
    finite = {name: value for name, value in found.items() if 0 <= value < 2**63}
    return GuestSummary(**finite) if finite else None
