"""Many sandboxes' Prometheus text as one: labels added, names changed, families together. Pure.

Whole families go through one substitution each, since 30 sandboxes have tens of thousands of lines.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

__all__ = ["Families", "label_text", "merge", "render"]

Families = dict[str, tuple[str, list[str]]]
"""Name of a family to its HELP and TYPE lines, as first seen, and to the samples of each sandbox."""

_HEAD = re.compile(r"^# (?:HELP|TYPE) ([a-zA-Z_:][a-zA-Z0-9_:]*).*\n", re.MULTILINE)
_BARE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?=[ \t])", re.MULTILINE)
_LABELLED = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)\{(?=([^}]))?", re.MULTILINE)
_FOREIGN = re.compile(r"^(# (?:HELP|TYPE) )?(?=go_|process_)", re.MULTILINE)


def label_text(labels: Mapping[str, str]) -> str:
    """a="1",b="2", with what must be escaped."""
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def merge(into: Families, text: str, labels: str, prefixes: Sequence[str] = ()) -> None:
    """Add one sandbox's text; `labels` as label_text gives them. With `prefixes` only families that begin so."""
    if not text.endswith("\n"):
        text += "\n"
    text = _FOREIGN.sub(r"\1kata_shim_", text)
    heads: dict[str, str] = {}
    name, at = "", 0
    for head in [*_HEAD.finditer(text), None]:
        samples = text[at : head.start() if head else len(text)]
        if samples.strip():
            _add(into, name, heads.get(name, ""), samples, labels, prefixes)
        if head:
            name, at = head[1], head.end()
            if head[0] not in heads.get(name, ""):
                heads[name] = heads.get(name, "") + head[0]


def _add(into: Families, name: str, head: str, samples: str, labels: str, prefixes: Sequence[str]) -> None:
    """Samples before any HELP or TYPE have the name of the first of them."""
    name = name or re.split(r"[{ \t]", samples.lstrip(), maxsplit=1)[0]
    if prefixes and not name.startswith(tuple(prefixes)):
        return
    samples = _LABELLED.sub(lambda found: f"{found[1]}{{{labels}{',' if found[2] else ''}", samples)
    samples = _BARE.sub(lambda found: f"{found[1]}{{{labels}}}", samples)
    into.setdefault(name, (head, []))[1].append(samples)


def render(families: Families) -> Iterable[str]:
    """The text, by family."""
    for head, samples in families.values():
        yield head
        yield from samples
