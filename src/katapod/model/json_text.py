"""JSON of our own files, where a path of this host may have bytes that are no UTF-8. Pure.

Python has such a byte as a lone surrogate (PEP 383), and it is written as one: "\\udcff". JSON's grammar has that (RFC
8259, section 8.2), only the fast reader and writer do not.
"""

import json
from typing import Any, TypeVar

import msgspec

__all__ = ["decode_json", "encode_json"]

_Kind = TypeVar("_Kind")


def encode_json(value: Any, *, indent: int = 0) -> bytes:
    """On one line, or with `indent` on many."""
    try:
        text = msgspec.json.encode(value)
    except UnicodeEncodeError:
        return json.dumps(msgspec.to_builtins(value), indent=indent or None).encode()
    return msgspec.json.format(text, indent=indent) if indent else text


def decode_json(data: bytes, kind: type[_Kind]) -> _Kind:
    """Raises msgspec.DecodeError, of which ValidationError is one."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError as exc:
        if b"\\ud" not in data:
            raise
        try:
            found = json.loads(data)
        except ValueError:
            raise exc from None
        return msgspec.convert(found, kind)
