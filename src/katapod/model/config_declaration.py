"""What is declared of a key of configuration.toml, once, where the key is.

A key that Katapod acts upon is a field of a struct in config_keys.py: type, bounds and default are the field's, what
else holds is the Key in its annotation, and the docstring below it is its documentation. A key that Katapod knows and
does not act upon is a RefusedKey in config_refused.py. Everything else is made from these two: the parser (config.py),
the annotations of pods (config_annotations.py), `config show` (config_text.py), the reference page and the sample file
(tools/generate_configuration.py). docs/adr/0038-one-declaration-a-key.md has the reasons.
"""

from collections.abc import Callable
from typing import Any, Literal

from msgspec import Struct

__all__ = ["AnnotationRule", "Key"]


class AnnotationRule(Struct, frozen=True, kw_only=True, eq=False):
    """A pod may set the key by an annotation. One of a hypervisor table has to be allowed by enable_annotations too."""

    name: str = ""
    """What follows io.katacontainers.config.TABLE., or the whole name if it starts otherwise. Empty: the key's name."""

    allowed_by: str = ""
    """Key of the same table, one of whose glob patterns has to match the file."""

    hash_name: str = ""
    """Name of the annotation that gives the SHA-512 of the file."""

    absolute: bool = False
    """The value is an absolute path, and not empty."""

    positive: bool = False
    """0 is refused."""

    at_most_host_cpus: bool = False

    ignore_empty: bool = False
    """An empty value, or 0, changes nothing."""

    separator: str = ""
    """Between the items of a list. Empty: the list is a JSON array."""

    combine: Literal["replace", "append", "merge"] = "replace"
    """What happens to the file's value. append: the items are added to it; merge: parameters of the guest's kernel
    take the place of those with the same name, and are added otherwise."""


class Key(Struct, frozen=True, kw_only=True, eq=False):
    """A key that is acted upon: what its type does not say."""

    unit: str = ""

    unset: object = None
    """The value that stands for the default, as if the key were absent. None: there is none."""

    path: bool = False
    """The value is an absolute path."""

    minimum: int = 0
    """What a guest needs. A file's smaller value is replaced by the default, with a warning; an annotation's is
    refused."""

    check: Callable[[Any], str] | None = None
    """Returns what is wrong with a value of the right type; empty: nothing."""

    refusal: str = ""
    """Why the type has one value only, and which one to use."""

    annotation: AnnotationRule | None = None
    """None: a pod cannot set it."""
