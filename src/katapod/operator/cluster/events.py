"""Events of a KataConfig, from what has changed of its conditions and of the phases of nodes. Pure."""

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, NamedTuple

from katapod.model.kataconfig import Condition, Status
from katapod.operator.cluster.node_plan import NodePlan, Phase
from katapod.operator.cluster.views import ConfigView
from katapod.operator.names import GROUP, MANAGER

__all__ = ["changes_of", "event_object", "known_phases", "node_changes", "phases_of"]

LENGTH = 1000  # characters; the API takes 1024
BAD = (Phase.FAILED, Phase.STUCK)
TOLD_OF = (Phase.READY, *BAD)
WARNINGS = ("Degraded", "Blocked")


class Told(NamedTuple):
    warning: bool
    reason: str
    message: str


def changes_of(before: Status, after: Status) -> Iterator[Told]:
    conditions = {one.type: one for one in before.conditions}
    for one in after.conditions:
        if one.type in WARNINGS and _is_new(conditions.get(one.type), one):
            yield Told(True, one.reason, one.message)


def phases_of(nodes: Iterable[NodePlan]) -> dict[str, str]:
    return {one.node.name: str(one.phase) for one in nodes if one.phase}


def known_phases(status: Status, nodes: Iterable[NodePlan]) -> dict[str, str]:
    """What was told of before this operator began: by the status and, of nodes that it has no room for, that they are
    ready."""
    told: dict[str, str] = {one.name: one.phase for one in status.nodes}
    if status.nodes_omitted:
        told = {one.node.name: str(Phase.READY) for one in nodes if one.phase == Phase.READY} | told
    return told


def node_changes(before: Mapping[str, str], nodes: Iterable[NodePlan]) -> Iterator[Told]:
    for one in nodes:
        if one.phase in TOLD_OF and before.get(one.node.name) != one.phase:
            yield Told(one.phase in BAD, f"Node{one.phase}", f"{one.node.name}: {one.message}")


def _is_new(old: Condition | None, new: Condition) -> bool:
    return new.status == "True" and (old is None or (old.status, old.reason) != (new.status, new.reason))


def event_object(config: ConfigView, told: Told, at: datetime) -> dict[str, Any]:
    """Events of an object without a namespace are in `default`, where kubectl describe looks for them."""
    time = at.strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"generateName": f"{config.name}.", "namespace": "default"},
        "involvedObject": {
            "apiVersion": f"{GROUP}/v1",
            "kind": "KataConfig",
            "name": config.name,
            "uid": config.uid,
        },
        "type": "Warning" if told.warning else "Normal",
        "reason": told.reason,
        "message": told.message[:LENGTH],
        "source": {"component": MANAGER},
        "firstTimestamp": time,
        "lastTimestamp": time,
        "count": 1,
    }
