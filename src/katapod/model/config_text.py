"""The effective configuration as text: TOML that can be read again, each key with where its value comes from."""

from typing import Any

from katapod.model.config import BUILT_IN, ParsedConfig
from katapod.model.config_keys import TABLES
from katapod.model.toml_text import toml_value

__all__ = ["config_table", "render_config", "toml_value"]

DEFAULT = "default"


def config_table(parsed: ParsedConfig) -> dict[str, dict[str, dict[str, Any]]]:
    """Table to key to {"value", "origin"}; the origin is a file's name or "default"."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for table, field in TABLES.items():
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
