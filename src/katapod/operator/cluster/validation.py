"""What the schema of KataConfig cannot say: each problem with the field's path. Pure.

The webhook and the status say them.
"""

import re
from collections.abc import Iterator
from functools import lru_cache

import msgspec

from katapod.model.config import judge_config
from katapod.model.errors import ConfigError
from katapod.model.kataconfig import Selector, Spec
from katapod.operator.cluster.profiles import handler_of, node_settings

__all__ = ["problems_of"]

NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
PREFIX = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
PREFIX_MAX = 253
HANDLERS_MAX = 16  # a node's report of them has 4096 bytes: Kubernetes' limit of a termination message
SETTINGS_MAX = 100_000  # bytes: one argument of a node job's program, of which Linux takes 128 KiB (execve(2))


def problems_of(spec: Spec) -> tuple[str, ...]:
    """Empty if it can be followed."""
    return (*_of_selector(spec.kata_config_pool_selector), *_of_configuration(spec))


def _of_selector(selector: Selector | None) -> Iterator[str]:
    if selector is None:
        return
    place = "spec.kataConfigPoolSelector"
    for key in selector.match_labels:
        if not is_label(key):
            yield f"{place}.matchLabels: {key!r} is no key of a label"
    for index, one in enumerate(selector.match_expressions):
        here = f"{place}.matchExpressions[{index}]"
        if not is_label(one.key):
            yield f"{here}.key: {one.key!r} is no key of a label"
        if one.operator in ("In", "NotIn") and not one.values:
            yield f"{here}.values: {one.operator} needs at least one"
        if one.operator in ("Exists", "DoesNotExist") and one.values:
            yield f"{here}.values: {one.operator} takes none"


def is_label(key: str) -> bool:
    """Source: Kubernetes documentation, Labels and Selectors, Syntax."""
    prefix, slash, name = key.rpartition("/")
    return bool(NAME.fullmatch(name)) and (not slash or (len(prefix) <= PREFIX_MAX and bool(PREFIX.fullmatch(prefix))))


def _of_configuration(spec: Spec) -> Iterator[str]:
    yield from _of_toml("spec.configuration", spec.configuration)
    first: dict[str, tuple[str, str]] = {}  # by handler: the configuration, and where it is
    for index, one in enumerate(spec.runtime_classes):
        place = f"spec.runtimeClasses[{index}].configuration"
        yield from _of_toml(place, one.configuration)
        configuration, there = first.setdefault(handler_of(one), (one.configuration, place))
        if configuration != one.configuration:
            yield f"{place}: it is not that of {there}, and both have the handler {handler_of(one)}: give one another"
    if len(first) > HANDLERS_MAX:
        yield f"spec.runtimeClasses: they have {len(first)} handlers, and a node can have {HANDLERS_MAX}"
    if (size := len(msgspec.json.encode(node_settings(spec)))) > SETTINGS_MAX:
        yield (
            f"spec.runtimeClasses: with spec.configuration for each of their handlers they have {size} bytes of "
            f"configuration, and {SETTINGS_MAX} is the most"
        )


@lru_cache(maxsize=64)
def _of_toml(place: str, text: str) -> tuple[str, ...]:
    """The keys that no node could use, each with its line."""
    if not text.strip():
        return ()
    try:
        problems = judge_config(b"", place, [(place, text.encode())]).problems
    except ConfigError as exc:
        return (str(exc),)
    return tuple(str(one) for one in problems if one.stops)
