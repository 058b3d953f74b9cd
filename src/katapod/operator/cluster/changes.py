"""What the operator may ask of the API server. Each can be repeated: the second time it changes nothing."""

from dataclasses import dataclass
from typing import Any

__all__ = ["ApplyClass", "Change", "ChangeConfig", "ChangeNode", "CreateJob", "DeleteClass", "DeleteJob"]


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


Change = ChangeNode | CreateJob | DeleteJob | ApplyClass | DeleteClass | ChangeConfig
