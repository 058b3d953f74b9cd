"""Values as TOML."""

from collections.abc import Mapping

__all__ = ["toml_value"]


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
