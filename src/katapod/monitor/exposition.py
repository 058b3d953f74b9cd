"""Many sandboxes' Prometheus text as one: labels added, names changed, families together. Pure.

Each family takes one substitution, since 30 sandboxes have tens of thousands of lines. The time is linear in the text,
part of which guests have written.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct, field

__all__ = ["LINES_MAX", "Families", "Family", "label_text", "merge", "render"]

LINES_MAX = 20_000  # per sandbox; usually there are some 600, of which the guest may send 5,000 at most


class Family(Struct):
    """`heads`: HELP and TYPE lines, with the number of sandboxes that have them. `samples`: of each sandbox."""

    heads: dict[str, int] = field(default_factory=dict)
    samples: list[str] = field(default_factory=list)


Families = dict[str, Family]

_HEAD = re.compile(r"^# (HELP|TYPE) ([a-zA-Z_:][a-zA-Z0-9_:]*+).*+\n", re.MULTILINE)
_BARE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*+)(?=[ \t])", re.MULTILINE)
_LABELLED = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*+)\{(?=([^}]))?", re.MULTILINE)
_FOREIGN = re.compile(r"^(# (?:HELP|TYPE) )?(?=go_|process_)", re.MULTILINE)


def label_text(labels: Mapping[str, str]) -> str:
    """a="1",b="2", escaped as needed."""
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def merge(into: Families, text: str, labels: str, prefixes: Sequence[str] = ()) -> None:
    """Add one sandbox's text; `labels` as from label_text. With `prefixes` only families whose names begin so.

    The first HELP and the first TYPE of each name are kept; lines beyond LINES_MAX are dropped.
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
            # samples before any HELP or TYPE belong to the family of the first sample
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
    """The text, by family, with the HELP and TYPE that most sandboxes have: a single one cannot forge them."""
    for family in families.values():
        yield max(family.heads, key=family.heads.__getitem__)
        yield from family.samples
