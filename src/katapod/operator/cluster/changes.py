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
    "EvictPod",
    "describe",
    "name_of",
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
class EvictPod:
    """By the API that heeds PodDisruptionBudgets. Source: Kubernetes API, policy Eviction."""

    name: str  # NAMESPACE/NAME


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


Change = (
    ChangeNode | CreateJob | DeleteJob | ApplyClass | DeleteClass | EvictPod | ChangeConfig | ApplyObject | DeleteObject
)


def name_of(change: Change) -> str:
    """The object's."""
    name: str = change.body["metadata"]["name"] if isinstance(change, CreateJob | ApplyClass) else change.name
    return name


def describe(change: Change) -> str:
    """For the log: a job's text is long."""
    if isinstance(change, CreateJob):
        metadata = change.body["metadata"]
        return f"CreateJob(name={metadata['name']!r}, {metadata['annotations']})"
    return str(change)
