"""JSON that engines write, as frozen values: a limit first, nulls as absent values, errors that name the place."""

import re
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from katapod.model.errors import SpecError
from katapod.model.json_text import decode_json

__all__ = ["I64", "U32", "U64", "Part", "decode", "impossible", "wrong"]

MAX_SPEC_BYTES = 16 << 20
"""A config.json with a full seccomp profile has some 30 KiB; the limit comes before the parser."""

U32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
I64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
U64 = Annotated[int, Meta(ge=0)]
"""msgspec takes no bound above an int64; `decode` checks the upper one."""


class Part(Struct, frozen=True, kw_only=True, omit_defaults=True, rename="camel"):
    """Common options: values cannot change, JSON names are in camel case, absent values are left out."""


_T = TypeVar("_T")


def decode(data: bytes, kind: type[_T], where: str) -> _T:
    """Parse `data`, which `where` names, as a `kind`. Raises SpecError."""
    if len(data) > MAX_SPEC_BYTES:
        raise SpecError(f"cannot read {where}: it has {len(data)} bytes, more than {MAX_SPEC_BYTES}")
    try:
        try:
            value = decode_json(data, kind)
        except msgspec.ValidationError:
            # Rare: either it is wrong, or it has nulls. Only the second attempt pays for removing them.
            value = msgspec.convert(_without_nulls(decode_json(data, object)), type=kind)
    except msgspec.ValidationError as error:
        path, message = _explain(str(error))
        raise wrong(where, path, message) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SpecError(f"cannot read {where}: it is not JSON: {error}") from error
    _check_values(value, where, "")
    return value


def _without_nulls(raw: Any) -> Any:
    if isinstance(raw, dict):
        return {key: _without_nulls(item) for key, item in raw.items() if item is not None}
    if isinstance(raw, list):
        return [_without_nulls(item) for item in raw]
    return raw


_MISSING = re.compile(r"Object missing required field `(\w+)`")


def _explain(message: str) -> tuple[str, str]:
    """Split msgspec's message, "Expected `array`, got `str` - at `$.process.args`", into path and cause."""
    cause, _, path = message.partition(" - at `$")
    path = path.rstrip("`").lstrip(".").replace("[...]", "[]")
    if missing := _MISSING.fullmatch(cause):
        return (f"{path}.{missing[1]}" if path else missing[1]), "missing"
    return path, cause[:1].lower() + cause[1:].replace("`", "")


def wrong(where: str, path: str, cause: str) -> SpecError:
    """The error about the value at the JSON path `path` of the file `where`."""
    return SpecError(f"{where}: {path}: {cause}" if path else f"{where}: {cause}")


def _check_values(value: Any, where: str, path: str) -> None:
    """No text may hold a NUL (the kernel's strings end there) and no number may exceed 64 bits."""
    if isinstance(value, str):
        if "\0" in value:
            raise wrong(where, path, "has a NUL character")
    elif isinstance(value, int):
        if value >= 2**64:
            raise wrong(where, path, f"{value} is more than 64 bits can hold")
    elif isinstance(value, Struct):
        for key, name in zip(value.__struct_encode_fields__, value.__struct_fields__, strict=True):
            _check_values(getattr(value, name), where, f"{path}.{key}" if path else key)
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            _check_values(item, where, f"{path}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_values(key, where, path)
            _check_values(item, where, f"{path}.{key}")


def impossible(where: str, path: str, cause: str) -> SpecError:
    """For what the specification knows and a guest cannot have."""
    return SpecError(f"{where}: {path}: {cause}", hint="remove it")
