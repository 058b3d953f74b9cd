"""Write what is made from the declarations of the configuration's keys: the reference page and the sample file.

Run it after a change of config_keys.py or config_refused.py: `make configuration`. With --check it writes nothing and
fails when a file is out of date.
"""

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from msgspec import Meta, Struct

from katapod.model import config_keys
from katapod.model.config_annotations import Annotation, known_annotations
from katapod.model.config_keys import SECTIONS, bare, declaration
from katapod.model.config_refused import OBSOLETE_KEYS, OBSOLETE_TABLES, REFUSED_KEYS
from katapod.model.toml_text import toml_value

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "how-to" / "configuration-keys.md"
SAMPLE = ROOT / "packaging" / "configuration.toml"
WIDTH = 118
LARGE = 2**31
"""Bounds from here on say only how wide the number is."""

PAGE_HEAD = """\
# Keys of configuration.toml

`make configuration` writes this page from the declarations of the keys: do not edit it.
[configuration.md](configuration.md) says where the file is, how to check it, and how a pod changes its own.

The names of annotations stand without `io.katacontainers.config.` in front. Those of `hypervisor` must be allowed by
`enable_annotations`, too.
"""
SAMPLE_HEAD = """\
# Katapod's configuration, in the format of Kata Containers. See docs/how-to/configuration.md.
#
# Read from /etc/kata-containers/configuration.toml or, if that does not exist, from
# /usr/share/kata-containers/defaults/configuration.toml. To change something, copy this file to /etc.
# Keys of Kata Containers that are not here are refused unless they ask for nothing: kata-runtime config check FILE.
# Every key is shown with its default; remove the # in front of a key and change its value.
"""


def documentation() -> dict[str, dict[str, str]]:
    """Name of a struct to the docstrings of its fields."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(config_keys)).body:
        if isinstance(node, ast.ClassDef):
            texts = found.setdefault(node.name, {})
            for field, text in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    assert isinstance(field.target, ast.Name)
                    texts[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
    return found


def rows() -> Iterator[tuple[str, list[tuple[str, Any, str, str]]]]:
    """(table, (key, default, type, documentation) of each key that is acted upon)."""
    texts = documentation()
    for table, section in SECTIONS.items():
        default = section()
        yield (
            table,
            [
                (name, getattr(default, name), type_text(table, name), texts[section.__name__][name])
                for name in section.__struct_fields__
            ],
        )


def type_text(table: str, name: str) -> str:
    """ "integer, MiB, 64 to 65536"."""
    found = declaration(table, name)
    assert found is not None
    kind, key = found
    parts = [_kind_text(bare(kind), path=key.path)]
    bounds = [item for item in getattr(kind, "__metadata__", ()) if isinstance(item, Meta)]
    least, most = (bounds[0].ge, bounds[0].le) if bounds else (None, None)
    if key.unit and not key.refusal:
        parts.append(key.unit)
    if most is not None and most < LARGE:
        parts.append(f"{least} to {most}")
    if key.minimum:
        parts.append(f"at least {key.minimum}")
    default = getattr(SECTIONS[table](), name)
    if key.unset is None or key.unset == default:
        return ", ".join(parts)
    return f"{', '.join(parts)}; {'empty' if key.unset == '' else key.unset}: the default"


def _kind_text(kind: Any, *, path: bool = False) -> str:
    if get_origin(kind) is Literal:
        *choices, last = [toml_value(choice) for choice in get_args(kind)]
        return f"{', '.join(choices)} or {last}" if choices else f"only {last}"
    if get_origin(kind) in (tuple, list):
        return "array of tables" if get_origin(get_args(kind)[0]) is dict else "array of strings"
    if get_origin(kind) is dict:
        return "table"
    return "absolute path" if path else {bool: "boolean", int: "integer", float: "number", str: "string"}[kind]


def annotation_texts() -> dict[tuple[str, str], list[str]]:
    """(table, key) to what annotations do with it."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, annotation in known_annotations().items():
        text = f"`{name.removeprefix('io.katacontainers.config.')}`"
        limits = "the SHA-512 of the file" if annotation.is_hash else ", ".join(_limits(annotation))
        found.setdefault((annotation.table, annotation.key), []).append(f"{text}: {limits}" if limits else text)
    return found


def _limits(annotation: Annotation) -> Iterator[str]:
    rule = annotation.rule
    if rule.allowed_by:
        yield f"a file that `{rule.allowed_by}` allows"
    if rule.absolute:
        yield "an absolute path"
    if rule.positive:
        yield "greater than 0"
    if rule.at_most_host_cpus:
        yield "at most the CPUs of the host"
    if rule.separator:
        yield "items separated by " + ("blanks" if rule.separator == " " else f"`{rule.separator}`")
    elif get_origin(annotation.kind) in (tuple, list):
        yield "a JSON array"
    if rule.combine == "append":
        yield "added to the file's"
    if rule.combine == "merge":
        yield "takes the place of parameters of the same name, and is added otherwise"


def render_page() -> str:
    annotations = annotation_texts()
    lines = [PAGE_HEAD, "## Keys that are honoured"]
    for table, keys in rows():
        lines += ["", f"### [{table}]", ""]
        if more := _section_text(SECTIONS[table]):
            lines += [f"{more}.", ""]
        lines += ["| Key | Default | Type | Annotation | Meaning |", "|---|---|---|---|---|"]
        for name, default, kind, text in keys:
            pod = "; ".join(annotations.get((table, name), ["none"]))
            lines.append(f"| `{name}` | `{toml_value(default)}` | {_code(kind)} | {pod} | {_linked(text)} |")
    lines += ["", "## Keys that are not acted upon", ""]
    lines += ["Any other value, of the key or of its annotation, is refused with the reason, and nothing starts:"]
    lines += ["[ADR 18](../adr/0018-honoured-or-refused.md)."]
    for table, refused in REFUSED_KEYS.items():
        lines += [
            "",
            f"Of `[{table}]`:",
            "",
            "| Key | Accepted values | Type | Annotation | Why |",
            "|---|---|---|---|---|",
        ]
        for key in refused.values():
            accepted = ", ".join(f"`{toml_value(value)}`" for value in key.neutral) or "any"
            pod = "; ".join(annotations.get((table, key.name), ["none"]))
            lines.append(f"| `{key.name}` | {accepted} | {_kind_text(key.kind)} | {pod} | {_linked(key.why)} |")
    lines += ["", "Annotations that are refused whatever they say:", "", "| Annotation | Why |", "|---|---|"]
    lines += [f"| `{name}` | {each.why} |" for name, each in known_annotations().items() if each.why]
    lines += ["", "Obsolete, of older releases; they are reported, and the start goes on:", ""]
    lines += [f"- of `[{table}]`: {', '.join(f'`{key}`' for key in keys)}" for table, keys in OBSOLETE_KEYS.items()]
    lines += [f"- the tables {', '.join(f'`[{table}]`' for table in OBSOLETE_TABLES)}"]
    return "\n".join(lines) + "\n"


def _section_text(section: type[Struct]) -> str:
    """What a struct's docstring says beside the table's name."""
    text = (section.__doc__ or "").partition(": ")[2].rstrip(".")
    return text[:1].upper() + text[1:]


def _code(kind: str) -> str:
    return re.sub(r'"[^"]*"', lambda found: f"`{found[0]}`", kind)


def _linked(text: str) -> str:
    """Paths below docs/ as links of the page."""
    text = re.sub(r"docs/adr/(0*(\d+)-[\w-]+\.md)", r"[ADR \2](../adr/\1)", text)
    return re.sub(r"docs/how-to/([\w-]+\.md)", r"[\1](\1)", text)


def render_sample() -> str:
    lines = [SAMPLE_HEAD]
    for table, keys in rows():
        if more := _section_text(SECTIONS[table]):
            lines.append(f"# {more}.")
        lines += [f"[{table}]", ""]
        for name, default, kind, text in keys:
            lines += [f"# {line}" for line in textwrap.wrap(text.replace("`", ""), WIDTH, break_on_hyphens=False)]
            if re.search("[,;]| or ", kind):  # more than the default below shows by itself
                lines.append(f"# {kind[0].upper()}{kind[1:]}.")
            lines += [f"#{name} = {toml_value(default)}", ""]
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    made = {PAGE: render_page(), SAMPLE: render_sample()}
    if "--check" in sys.argv[1:]:
        old = [str(path.relative_to(ROOT)) for path, text in made.items() if path.read_text() != text]
        if old:
            print(f"out of date: {', '.join(old)}; run: make configuration", file=sys.stderr)
        return 1 if old else 0
    for path, text in made.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
