"""The effective configuration as text: TOML that can be read again, each key with where its value comes from."""

from collections.abc import Mapping
from typing import Any

from katapod.model.config import BUILT_IN, ParsedConfig

__all__ = ["config_table", "render_config", "toml_value"]

DEFAULT = "default"
_FIELDS = {
    "hypervisor.qemu": "qemu",
    "agent.kata": "agent",
    "runtime": "runtime",
    "factory": "factory",
    "katapod": "katapod",
}


def config_table(parsed: ParsedConfig) -> dict[str, dict[str, dict[str, Any]]]:
    """Table to key to {"value", "origin"}; the origin is a file's name or "default"."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for table, field in _FIELDS.items():
        section = getattr(parsed.config, field)
        found[table] = {
            key: {
                "value": list(value) if isinstance(value := getattr(section, key), tuple) else value,
                "origin": parsed.origins.get((table, key), DEFAULT),
            }
            for key in section.__struct_fields__
        }
    return found


def render_config(parsed: ParsedConfig) -> str:
    files = sorted({*parsed.origins.values(), parsed.source} - {BUILT_IN})
    lines = [f"# {BUILT_IN}" if not files else "# effective configuration, from:"]
    lines += [f"#   {name}" for name in files]
    for table, keys in config_table(parsed).items():
        lines += ["", f"[{table}]"]
        lines += [f"{key} = {toml_value(one['value'])}  # {one['origin']}" for key, one in keys.items()]
    return "\n".join(lines) + "\n"


def toml_value(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case str():
            return _toml_text(value)
        case list() | tuple():
            return f"[{', '.join(toml_value(item) for item in value)}]"
        case Mapping():
            return "{" + ", ".join(f"{key} = {toml_value(item)}" for key, item in value.items()) + "}"
        case _:
            return str(value)


def _toml_text(text: str) -> str:
    short = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return (
        '"' + "".join(short.get(c) or (f"\\u{ord(c):04x}" if ord(c) < 32 or ord(c) == 127 else c) for c in text) + '"'
    )
