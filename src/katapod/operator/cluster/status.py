"""The status of a KataConfig: what is so, and why it is not otherwise. Pure."""

import heapq
from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from katapod.model.kataconfig import Condition, KataNodes, Spec, Status
from katapod.operator.cluster.node_plan import NodePlan, Phase
from katapod.operator.cluster.views import ConfigView

__all__ = ["Situation", "describe"]

_DEFAULTS = Spec()
NAMED = 10  # nodes or pods in one message
NAMES = 100  # in one list
LINES = 50  # of nodes; with the names, the status has some 30 kB at most, however many nodes there are


@dataclass(frozen=True, slots=True)
class Situation:
    spec: Spec = _DEFAULTS
    nodes: tuple[NodePlan, ...] = ()  # those that have something to do with us
    busy: frozenset[str] = frozenset()  # nodes with a job
    classes: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()  # RuntimeClasses of the spec's names that somebody else has made
    users: tuple[str, ...] = ()  # pods that deletion waits for
    invalid: str = ""  # why nothing is done at all
    backend: str = ""
    held: str = ""  # who has paused what nodes wait for
    trouble: tuple[str, str] | None = None  # reason and message of what fails, and no node says
    detail: str = ""  # how far what changes nodes has come
    waiting_for_mco: bool = False  # the machine-config operator has not answered our last change yet
    updating: bool = False  # all had come to rest before


def describe(config: ConfigView, now: Situation, at: datetime) -> Status:
    if now.invalid:
        told = {
            "Ready": (False, "Invalid", now.invalid),
            "Progressing": (False, "Invalid", now.invalid),
            "Degraded": (True, "Invalid", now.invalid),
            "Blocked": (False, "NotBlocked", ""),
            "InProgress": (False, "Failed", now.invalid),
        }
        return Status(
            config.generation, f"refused: {now.invalid}", _conditions(config, told, at), backend=config.status.backend
        )
    nodes = _lists(now.nodes)
    told = {
        "Ready": _ready(config, now, nodes),
        "Progressing": _progressing(config, now, nodes),
        "Degraded": _degraded(now),
        "Blocked": _blocked(now),
    }
    told["InProgress"] = _in_progress(told)
    return Status(
        observed_generation=config.generation,
        summary=_summary(config, nodes, told),
        conditions=_conditions(config, told, at),
        kata_nodes=nodes,
        nodes=tuple(one.status() for one in _shown(now.nodes)),
        nodes_omitted=max(len(now.nodes) - LINES, 0),
        runtime_classes=now.classes,
        backend=now.backend,
        waiting_for_mco_to_start=now.waiting_for_mco,
    )


def _shown(nodes: tuple[NodePlan, ...]) -> list[NodePlan]:
    """Of more than LINES those that have failed come first, and those that are ready last."""
    if len(nodes) <= LINES:
        return list(nodes)
    rank = {Phase.FAILED: 0, Phase.STUCK: 0, Phase.NOT_READY: 1, Phase.READY: 4, Phase.WAITING: 3}
    chosen = sorted(nodes, key=lambda one: rank.get(one.phase or Phase.READY, 2))[:LINES]
    return sorted(chosen, key=lambda one: one.node.name)


Told = tuple[bool, str, str]  # status, reason, message


def _conditions(config: ConfigView, told: dict[str, Told], at: datetime) -> tuple[Condition, ...]:
    before = {one.type: one for one in config.status.conditions}
    found = []
    for kind, (holds, reason, message) in told.items():
        old = before.get(kind)
        status: Literal["True", "False"] = "True" if holds else "False"
        since = old.last_transition_time if old is not None and old.status == status else _time(at)
        found.append(Condition(kind, status, reason, message, since, config.generation))
    return tuple(found)


def _time(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")


def _lists(nodes: tuple[NodePlan, ...]) -> KataNodes:
    by_phase: dict[Phase | None, list[str]] = defaultdict(list)
    for one in nodes:
        by_phase[one.phase].append(one.node.name)

    def of(*phases: Phase) -> tuple[str, ...]:
        return tuple(heapq.nsmallest(NAMES, (name for phase in phases for name in by_phase[phase])))

    there = (
        Phase.READY,
        Phase.NOT_READY,
        Phase.INSTALLING,
        Phase.DRAINING,
        Phase.SETTLING,
        Phase.WAITING,
        Phase.FAILED,
    )
    return KataNodes(
        node_count=sum(len(by_phase[phase]) for phase in there),
        ready_node_count=len(by_phase[Phase.READY]),
        installed=of(Phase.READY, Phase.NOT_READY),
        installing=of(Phase.INSTALLING, Phase.DRAINING, Phase.SETTLING),
        waiting_to_install=of(Phase.WAITING),
        failed_to_install=of(Phase.FAILED),
        uninstalling=of(Phase.UNINSTALLING),
        waiting_to_uninstall=of(Phase.LEAVING),
        failed_to_uninstall=of(Phase.STUCK),
    )


def _ready(config: ConfigView, now: Situation, nodes: KataNodes) -> Told:
    counts = f"{nodes.ready_node_count} of {nodes.node_count} nodes are ready"
    if config.leaving:
        return False, "Deleting", "the KataConfig is being deleted"
    if not nodes.node_count:
        return False, "NoNodes", "no node is chosen by spec.kataConfigPoolSelector and spec.checkNodeEligibility"
    if nodes.ready_node_count < nodes.node_count:
        return False, "NodesNotReady", counts
    missing = {one.name for one in now.spec.runtime_classes} - set(now.classes)
    if missing:
        return False, "RuntimeClassMissing", f"there is no RuntimeClass {', '.join(sorted(missing))} of ours"
    return True, "AllNodesReady", counts


def _progressing(config: ConfigView, now: Situation, nodes: KataNodes) -> Told:
    leaving = sum(one.phase in (Phase.UNINSTALLING, Phase.LEAVING, Phase.STUCK) for one in now.nodes)
    waiting = tuple(one.node.name for one in now.nodes if one.phase == Phase.WAITING)
    installing = "Updating" if now.updating else "Installing"
    detail = f"; {now.detail}" if now.detail else ""
    if now.users:
        return False, "Blocked", "deletion waits for pods"
    if now.held and not now.busy:
        return (
            False,
            "Paused",
            f"{now.held}; waiting: {_names((*nodes.waiting_to_install, *nodes.waiting_to_uninstall))}",
        )
    if config.leaving:
        at_work = _names(tuple(sorted(now.busy)))
        return True, "Uninstalling", f"{leaving} nodes are to be cleaned; at work: {at_work}{detail}"
    if nodes.installing or now.busy:
        return True, installing, f"at work: {_names(tuple(sorted(now.busy)) or nodes.installing)}{detail}"
    if leaving:
        return True, "Uninstalling", f"nodes that are no longer chosen: {leaving}"
    if waiting and now.spec.rollout.paused:
        return False, "Paused", f"spec.rollout.paused; waiting: {_names(waiting)}"
    if waiting and nodes.failed_to_install:
        return False, "Stopped", f"nodes have failed; waiting: {_names(waiting)}"
    if waiting:
        return True, installing, f"waiting: {_names(waiting)}{detail}"
    return False, "Idle", ""


def _degraded(now: Situation) -> Told:
    failed = [one for one in now.nodes if one.phase in (Phase.FAILED, Phase.STUCK)]
    if now.foreign:
        return True, "RuntimeClassTaken", f"somebody else has made the RuntimeClass {', '.join(now.foreign)}"
    if failed:
        return True, "NodesFailed", "; ".join(f"{one.node.name}: {one.message[:200]}" for one in failed[:NAMED])
    if now.trouble is not None:
        return True, *now.trouble
    away = tuple(one.node.name for one in now.nodes if one.phase == Phase.NOT_READY)
    if away:
        return True, "NodesNotReady", f"installed, and not Ready: {_names(away)}"
    return False, "AsExpected", ""


def _blocked(now: Situation) -> Told:
    if now.users:
        return True, "ExistingKataPods", f"deletion waits for {len(now.users)} pods: {_names(now.users)}"
    waiting = [one for one in now.nodes if one.phase == Phase.LEAVING and one.message]
    if waiting:
        return True, "ExistingKataPods", "; ".join(f"{one.node.name} {one.message[:200]}" for one in waiting[:NAMED])
    refused = [one for one in now.nodes if one.blocked]
    if refused:
        return True, "EvictionRefused", "; ".join(f"{one.node.name} {one.message[:200]}" for one in refused[:NAMED])
    return False, "NotBlocked", ""


def _in_progress(told: dict[str, Told]) -> Told:
    """Upstream's one condition, with its reasons."""
    if told["Blocked"][0]:
        return False, "BlockedByExistingKataPods", told["Blocked"][2]
    if told["Degraded"][1] == "NodesFailed":
        return True, "Failed", told["Degraded"][2]
    holds, reason, message = told["Progressing"]
    return (True, reason, message) if holds else (False, "Idle", "")


def _summary(config: ConfigView, nodes: KataNodes, told: dict[str, Told]) -> str:
    """The one line of `kubectl get kataconfig`."""
    for kind in ("Blocked", "Degraded"):
        if told[kind][0]:
            return told[kind][2]
    if told["Progressing"][0] or told["Progressing"][1] in ("Paused", "Stopped"):
        return f"{told['Progressing'][1].lower()}: {told['Progressing'][2]}"
    return told["Ready"][2]


def _names(names: tuple[str, ...]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
