"""Many sandboxes' Prometheus text as one: labels added, names changed, families together. Pure.

Whole families go through one substitution each, since 30 sandboxes have tens of thousands of lines. All of it is linear
in the text: a part of each sandbox's is its guest's.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["LINES_MAX", "Families", "Family", "label_text", "merge", "render"]

LINES_MAX = 20_000  # of one sandbox; one of ours has some 600, and its guest may say 5,000 at most


@dataclass(slots=True)
class Family:
    """`heads`: HELP and TYPE lines, and how many sandboxes have just these. `samples` of each sandbox."""

    heads: dict[str, int] = field(default_factory=dict)
    samples: list[str] = field(default_factory=list)


Families = dict[str, Family]

_HEAD = re.compile(r"^# (HELP|TYPE) ([a-zA-Z_:][a-zA-Z0-9_:]*+).*+\n", re.MULTILINE)
_BARE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*+)(?=[ \t])", re.MULTILINE)
_LABELLED = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*+)\{(?=([^}]))?", re.MULTILINE)
_FOREIGN = re.compile(r"^(# (?:HELP|TYPE) )?(?=go_|process_)", re.MULTILINE)


def label_text(labels: Mapping[str, str]) -> str:
    """a="1",b="2", with what must be escaped."""
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def merge(into: Families, text: str, labels: str, prefixes: Sequence[str] = ()) -> None:
    """Add one sandbox's text; `labels` as label_text gives them. With `prefixes` only families that begin so.

    One HELP and one TYPE are kept of each name, the first; lines beyond LINES_MAX are left out.
    """
    if text.count("\n") > LINES_MAX:
        text = text[: -len(text.split("\n", LINES_MAX)[-1])]
    if not text.endswith("\n"):
        text += "\n"
    text = _FOREIGN.sub(r"\1kata_shim_", text)
    heads: dict[str, dict[str, str]] = {}
    parts: dict[str, list[str]] = {}
    name, at = "", 0
    for head in [*_HEAD.finditer(text), None]:
        samples = text[at : head.start() if head else len(text)]
        if samples.strip():
            # samples before any HELP or TYPE have the name of the first of them
            parts.setdefault(name or re.split(r"[{ \t]", samples.lstrip(), maxsplit=1)[0], []).append(samples)
        if head:
            name, at = head[2], head.end()
            heads.setdefault(name, {}).setdefault(head[1], head[0])
    for name, samples in ((name, "".join(found)) for name, found in parts.items()):
        if not prefixes or name.startswith(tuple(prefixes)):
            family = into.setdefault(name, Family())
            head_text = "".join(heads.get(name, {}).values())
            family.heads[head_text] = family.heads.get(head_text, 0) + 1
            family.samples.append(_labelled(samples, labels))


def _labelled(samples: str, labels: str) -> str:
    samples = _LABELLED.sub(lambda found: f"{found[1]}{{{labels}{',' if found[2] else ''}", samples)
    return _BARE.sub(lambda found: f"{found[1]}{{{labels}}}", samples)


def render(families: Families) -> Iterable[str]:
    """The text, by family. What most sandboxes say of a family is its HELP and TYPE: one that lies does not decide."""
    for family in families.values():
        yield max(family.heads, key=family.heads.__getitem__)
        yield from family.samples
