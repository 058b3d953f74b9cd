"""JSON of our own files, where a path of this host may have bytes that are no UTF-8. Pure.

Python has such a byte as a lone surrogate (PEP 383), and it is written as one: "\\udcff". JSON's grammar has that (RFC
8259, section 8.2), only the fast reader and writer do not.
"""

import json
from pathlib import Path
from typing import Any, TypeVar

import msgspec

__all__ = ["decode_json", "encode_json"]

_Kind = TypeVar("_Kind")


def encode_json(value: Any, *, indent: int = 0) -> bytes:
    """On one line, or with `indent` on many."""
    try:
        text = msgspec.json.encode(value, enc_hook=_text_of)
    except UnicodeEncodeError:
        return json.dumps(msgspec.to_builtins(value, enc_hook=_text_of), indent=indent or None).encode()
    return msgspec.json.format(text, indent=indent) if indent else text


def decode_json(data: bytes, kind: type[_Kind]) -> _Kind:
    """Raises msgspec.DecodeError, of which ValidationError is one."""
    try:
        return msgspec.json.decode(data, type=kind, dec_hook=_path_of)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError as exc:
        if b"\\ud" not in data:
            raise
        try:
            found = json.loads(data)
        except ValueError:
            raise exc from None
        return msgspec.convert(found, kind, dec_hook=_path_of)


def _text_of(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(f"{type(value).__name__} has no form in JSON")


def _path_of(kind: type[Any], value: Any) -> Any:
    if kind is object:
        return value
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise NotImplementedError(f"{kind.__name__} has no form in JSON")
