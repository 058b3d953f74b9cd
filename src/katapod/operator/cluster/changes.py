"""What the operator may ask of the API server. Each can be repeated: the second time it changes nothing."""

from dataclasses import dataclass
from typing import Any

__all__ = [
    "ApplyClass",
    "ApplyObject",
    "Change",
    "ChangeConfig",
    "ChangeNode",
    "CreateJob",
    "DeleteClass",
    "DeleteJob",
    "DeleteObject",
    "describe",
]


@dataclass(frozen=True, slots=True)
class ChangeNode:
    name: str
    patch: dict[str, Any]


@dataclass(frozen=True, slots=True)
class CreateJob:
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class DeleteJob:
    name: str


@dataclass(frozen=True, slots=True)
class ApplyClass:
    body: dict[str, Any]
    new: bool


@dataclass(frozen=True, slots=True)
class DeleteClass:
    name: str


@dataclass(frozen=True, slots=True)
class ChangeConfig:
    """The finalizers of a KataConfig."""

    name: str
    finalizers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ApplyObject:
    """An object of the back end MachineConfig; what `body` does not name stays as it is."""

    kind: str
    name: str
    body: dict[str, Any]
    new: bool


@dataclass(frozen=True, slots=True)
class DeleteObject:
    kind: str
    name: str


Change = ChangeNode | CreateJob | DeleteJob | ApplyClass | DeleteClass | ChangeConfig | ApplyObject | DeleteObject


def describe(change: Change) -> str:
    """For the log: a job's text is long."""
    if isinstance(change, CreateJob):
        metadata = change.body["metadata"]
        return f"CreateJob(name={metadata['name']!r}, {metadata['annotations']})"
    return str(change)
