"""Annotations of a pod, or of a single container, that change its configuration: io.katacontainers.config.*.

Those of the hypervisor must be allowed by enable_annotations, paths to programs also by the valid_* globs; those of
runtime and agent are always honoured, as upstream does. What Katapod does not act upon is refused, as in a file.
Source: Kata Containers, docs/how-to/how-to-set-sandbox-config-kata.md.
"""

import glob
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, Final, get_args, get_origin

import msgspec
from msgspec import Struct

from katapod.model.config import ParsedConfig, Setting, below_minimum, take_setting
from katapod.model.config_declaration import AnnotationRule, Key
from katapod.model.config_keys import SECTIONS, TABLES, Config, bare, declaration
from katapod.model.errors import ConfigError

__all__ = ["AnnotatedConfig", "Annotation", "annotated", "apply_annotations", "check_hashes", "known_annotations"]

KATA: Final = "io.katacontainers."
PREFIX: Final = f"{KATA}config."
_TABLE_OF: Final = {table.partition(".")[0]: table for table in reversed(TABLES)}  # QEMU's of the hypervisors
_TRUE, _FALSE = ("1", "t", "T", "TRUE", "true", "True"), ("0", "f", "F", "FALSE", "false", "False")


class Annotation(Struct, frozen=True, kw_only=True):
    """What an annotation sets: `key` of `table`, whose type is `kind`."""

    table: str = ""
    key: str = ""
    kind: Any = str
    rule: AnnotationRule = AnnotationRule()
    declared: Key = Key()  # of a key that is acted upon
    is_hash: bool = False  # of the key's file; the key stays as it is
    why: str = ""  # it sets nothing, and this refuses it


@cache
def known_annotations() -> dict[str, Annotation]:
    """By name, from what is declared with each key."""
    from katapod.model.config_refused import REFUSED_ANNOTATIONS

    found = {name: Annotation(why=why) for name, why in REFUSED_ANNOTATIONS.items()}
    for annotation in _of_keys():
        rule = annotation.rule
        prefix = PREFIX + annotation.table.partition(".")[0]
        name = rule.name or annotation.key
        found[name if name.startswith(KATA) else f"{prefix}.{name}"] = annotation
        if rule.hash_name:
            found[f"{prefix}.{rule.hash_name}"] = msgspec.structs.replace(annotation, is_hash=True)
    return found


def _of_keys() -> Iterator[Annotation]:
    from katapod.model.config_refused import REFUSED_KEYS

    for table, section in SECTIONS.items():
        for name in section.__struct_fields__:
            if (annotation := _of_key(table, name)) is not None:
                yield annotation
    for table, keys in REFUSED_KEYS.items():
        for refused in keys.values():
            if refused.annotation is not None:
                yield Annotation(table=table, key=refused.name, kind=refused.kind, rule=refused.annotation)


def _of_key(table: str, name: str) -> Annotation | None:
    """The annotation of a key that is acted upon."""
    if (found := declaration(table, name)) is None:
        return None
    kind, key = found
    rule = key.annotation
    return Annotation(table=table, key=name, kind=bare(kind), rule=rule, declared=key) if rule is not None else None


def _find(name: str) -> Annotation | None:
    """known_annotations, but what is usual, a key's own name, is found without the declarations of all others."""
    prefix, _, key = name.removeprefix(PREFIX).partition(".")
    found = _of_key(_TABLE_OF.get(prefix, ""), key)
    return found if found is not None and not found.rule.name else known_annotations().get(name)


class AnnotatedConfig(Struct, frozen=True):
    """`hashes`: file to the SHA-512, in hex, that the pod says it has."""

    config: Config
    hashes: dict[str, str] = {}


def annotated(parsed: ParsedConfig, annotations: Mapping[str, str], host_cpus: int) -> ParsedConfig:
    """apply_annotations, and the hashes checked. Raises ConfigError."""
    if not any(name.startswith(KATA) for name in annotations):
        return parsed
    found = apply_annotations(parsed.config, annotations, host_cpus=host_cpus)
    check_hashes(found.hashes)
    return msgspec.structs.replace(parsed, config=found.config)


def apply_annotations(
    config: Config,
    annotations: Mapping[str, str],
    *,
    host_cpus: int,
    expand: Callable[[str], list[str]] = glob.glob,
) -> AnnotatedConfig:
    """The configuration of one sandbox. `expand`: the files that a glob stands for.

    Raises ConfigError that names every annotation that is not enabled, unknown, wrong or not supported.
    """
    values: dict[str, dict[str, Any]] = {table: {} for table in SECTIONS}
    errors: list[str] = []
    hashes: dict[str, str] = {}
    for name in sorted(annotations):
        if not name.startswith(KATA) or not (name.startswith(PREFIX) or name in known_annotations()):
            continue
        try:
            _apply(name, annotations[name], config, values, hashes, host_cpus, expand)
        except ValueError as error:
            errors.append(f"cannot use the annotation {name}: {error}")
    if errors:
        raise ConfigError("\n".join(errors), hint="correct the pod's annotations, or allow them in configuration.toml")
    changed = {
        field: msgspec.structs.replace(getattr(config, field), **values[table])
        for table, field in TABLES.items()
        if values[table]
    }
    config = msgspec.structs.replace(config, **changed) if changed else config
    files = {getattr(config.qemu, key): digest for key, digest in hashes.items()}
    return AnnotatedConfig(config, files)


def check_hashes(hashes: Mapping[str, str]) -> None:
    """Compare files with what the pod says of them. Raises ConfigError."""
    for path, wanted in hashes.items():
        try:
            with open(path, "rb") as handle:
                found = hashlib.file_digest(handle, "sha512").hexdigest()
        except OSError as error:
            raise ConfigError(f"cannot read {path}, whose hash an annotation gives: {error.strerror}") from error
        if found != wanted.lower():
            raise ConfigError(
                f"cannot use {path}: its SHA-512 is {found[:16]}..., the annotation says {wanted[:16]}..."
            )


def _apply(
    name: str,
    text: str,
    config: Config,
    values: dict[str, dict[str, Any]],
    hashes: dict[str, str],
    host_cpus: int,
    expand: Callable[[str], list[str]],
) -> None:
    """Raises ValueError with the reason."""
    known = _find(name)
    if known is None:
        raise ValueError("no such annotation" + _nearest(name))
    base = name.removeprefix(f"{PREFIX}hypervisor.")
    if base != name and not any(re.search(pattern, base) for pattern in config.qemu.enable_annotations):
        raise ValueError(f"it is not enabled: no pattern of enable_annotations in [hypervisor.qemu] matches {base!r}")
    if known.why:
        raise ValueError(f"not supported: {known.why}")
    if known.is_hash:
        if not re.fullmatch(r"[0-9a-fA-F]{128}", text):
            raise ValueError("a SHA-512 has 128 hexadecimal digits")
        hashes[known.key] = text
        return
    section = getattr(config, TABLES[known.table])
    value = _value(text, known)
    if known.rule.ignore_empty and value in ("", 0):
        return
    _check(known, value, section, host_cpus, expand)
    if known.rule.combine == "merge":
        value = _merged_params(getattr(section, known.key), value)
    elif known.rule.combine == "append":
        value = [*getattr(section, known.key), *value]
    problem = take_setting(Setting(name, known.table, known.key, value), values)
    if problem is not None:
        raise ValueError(problem.message)


def _check(known: Annotation, value: Any, section: Any, host_cpus: int, expand: Callable[[str], list[str]]) -> None:
    """What holds for an annotation and not for the key in a file. Raises ValueError."""
    rule = known.rule
    if rule.allowed_by:
        patterns = getattr(section, rule.allowed_by)
        if not any(value in expand(pattern) or (value == "" and pattern == "") for pattern in patterns):
            raise ValueError(f"{value!r} is not one of the files that {rule.allowed_by} allows")
    if rule.absolute and not value.startswith("/"):
        raise ValueError(f"{value!r} is not an absolute path")
    if rule.positive and value == 0:
        raise ValueError("it must be greater than 0")
    if rule.at_most_host_cpus and value > host_cpus:
        raise ValueError(f"{value:g} is more than the {host_cpus} CPUs of this host")
    if known.declared.minimum and value < known.declared.minimum:
        raise ValueError(below_minimum(known.declared, value))


def _value(text: str, known: Annotation) -> Any:
    """The text, parsed as the key's type. Raises ValueError."""
    kind = known.kind
    origin = get_origin(kind) or kind
    if kind is bool:
        if text not in _TRUE + _FALSE:
            raise ValueError(f"{text!r} is neither true nor false")
        return text in _TRUE
    if kind is float:
        if not re.fullmatch(r"[0-9]+(\.[0-9]*)?", text):
            raise ValueError(f"{text!r} is not a number")
        return float(text)
    if kind is int or (get_args(kind) and isinstance(get_args(kind)[0], int)):
        if not re.fullmatch(r"[0-9]{1,20}", text):
            raise ValueError(f"{text!r} is not a whole number")
        return int(text)
    if origin in (tuple, list):
        if separator := known.rule.separator:
            return [part.strip() for part in text.split(separator) if part.strip()]
        try:
            return msgspec.json.decode(text, type=list[str])
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise ValueError(f"{text!r} is not a JSON array of strings: {error}") from error
    return text


def _merged_params(before: str, more: str) -> str:
    """A parameter of the annotation takes the place of one with the same key."""
    keys = {word.partition("=")[0] for word in more.split()}
    kept = [word for word in before.split() if word.partition("=")[0] not in keys]
    return " ".join([*kept, *more.split()])


def _nearest(name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, known_annotations(), n=1)
    return f"; did you mean {close[0]}?" if close else ""
