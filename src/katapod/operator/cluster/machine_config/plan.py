"""From what is there to what is to be done next, and to the situation: pure, called again after every change.

A chosen node costs one reboot: it joins our pool only when that pool's rendered MachineConfig has the runtime. What is
to go, goes in this order: new pods, running pods, RuntimeClasses, the nodes' labels, the MachineConfig, the pool.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from katapod.model.kataconfig import RuntimeClassSpec, Spec
from katapod.operator.cluster.changes import ApplyClass, ApplyObject, Change, ChangeNode, DeleteClass, DeleteObject
from katapod.operator.cluster.machine_config.names import (
    CONTENT,
    EXTENSION_CONFIG,
    IMAGE_CONFIG,
    LOG_CONFIG,
    POOL,
    POOL_LABEL,
    POOL_ROLE,
    WORKER,
)
from katapod.operator.cluster.machine_config.nodes import MachinePlan, Wish, plan_leaving, plan_machine
from katapod.operator.cluster.machine_config.objects import (
    POOL_CONFIGS,
    POOL_NODES,
    Content,
    content_of,
    log_config,
    machine_config,
    monitor,
    pool,
    pool_class,
)
from katapod.operator.cluster.machine_config.pools import (
    Member,
    is_chosen,
    is_member,
    member_of,
    selects_roles,
    target_pool,
)
from katapod.operator.cluster.machine_config.views import MachineObjects, PoolView
from katapod.operator.cluster.node_plan import Phase
from katapod.operator.cluster.objects import Settings, closed_class, node_change
from katapod.operator.cluster.profiles import handler_of
from katapod.operator.cluster.quantities import same
from katapod.operator.cluster.status import Situation
from katapod.operator.cluster.views import ClassView, ConfigView, NodeView, UserPod
from katapod.operator.names import CLOSED, READY_LABEL

__all__ = ["Outcome", "Scene", "give_up", "needs_users", "plan_pools"]


@dataclass(frozen=True, slots=True)
class Scene:
    """What is there. `users`: pods of our RuntimeClasses; None if needs_users() has seen no need."""

    nodes: tuple[NodeView, ...]
    classes: tuple[ClassView, ...]
    users: tuple[UserPod, ...] | None
    machine: MachineObjects


@dataclass(frozen=True, slots=True)
class Outcome:
    changes: tuple[Change, ...]
    situation: Situation
    gone: bool  # nothing of ours is left


def classes_of(spec: Spec) -> tuple[RuntimeClassSpec, ...]:
    """No sandbox is run on nodes to see by what VMs run there: those of an accelerator could not be served."""
    return tuple(one for one in spec.runtime_classes if one.accelerator is None)


def needs_users(config: ConfigView, spec: Spec, scene: Scene) -> bool:
    """Whether something is to be taken away that pods may use."""
    wanted = {(one.name, handler_of(one)) for one in classes_of(spec)}
    target = target_pool(spec, scene.machine)
    return (
        config.leaving
        or any(one.ours and (one.name, one.handler) not in wanted for one in scene.classes)
        or any(
            ((one.record is not None or is_member(one)) and not is_chosen(spec, one, target, scene.machine))
            or (is_member(one) and target != POOL)
            for one in scene.nodes
        )
    )


def plan_pools(config: ConfigView, spec: Spec, scene: Scene, settings: Settings) -> Outcome:
    return _Planner(config, spec, scene, settings).plan()


def give_up(machine: MachineObjects, nodes: tuple[NodeView, ...]) -> Iterator[Change]:
    """By force. A pool that has nodes stays, since they would lose what they were made from."""
    for node in nodes:
        if is_member(node):
            yield ChangeNode(node.name, {"metadata": {"labels": {POOL_ROLE: None}, "annotations": {}}})
    yield from _delete(machine)
    for one in machine.pools:
        if one.ours and not one.machines:
            yield DeleteObject("MachineConfigPool", one.name)


def _delete(machine: MachineObjects, *but: str) -> Iterator[DeleteObject]:
    """All but pools."""
    for kind, views in (
        ("MachineConfig", machine.configs),
        ("ContainerRuntimeConfig", machine.runtime_configs),
    ):
        for one in views:
            if one.ours and not one.leaving and one.name not in but:
                yield DeleteObject(kind, one.name)
    for found in machine.monitors:
        if not found.leaving and found.name not in but:
            yield DeleteObject("DaemonSet", found.name)


class _Planner:
    """One pass: what follows from the spec and what is seen, computed once."""

    def __init__(self, config: ConfigView, spec: Spec, scene: Scene, settings: Settings) -> None:
        self.config, self.spec, self.scene, self.settings = config, spec, scene, settings
        self.machine = scene.machine
        self.classes = classes_of(spec)
        self.target = target_pool(spec, scene.machine)
        self.content: Content = content_of(settings, scene.nodes)
        self.ours = [one for one in self.machine.configs if one.ours]
        self.rendered = {one.name: one for one in self.machine.configs}
        self.pools = {one.name: one for one in self.machine.pools}
        self.role = next((one.role for one in self.ours if one.name == self.content.name), "")
        self.labelled = any(is_member(one) for one in scene.nodes)
        self.our_classes = {one.name for one in scene.classes if one.ours}
        self.on_node: dict[str, list[str]] = defaultdict(list)
        for user in scene.users or ():
            self.on_node[user.node].append(user.name)

    def plan(self) -> Outcome:
        nodes = [self._plan_node(one) for one in sorted(self.scene.nodes, key=lambda one: one.name)]
        role = self._wanted_role()
        changes = [*_node_changes(nodes), *self._objects(role, nodes), *self._class_changes(nodes)]
        return Outcome(tuple(changes), self._situation(nodes), self._is_gone(nodes))

    def _is_gone(self, nodes: list[MachinePlan]) -> bool:
        if any(one.plan.phase or one.plan.write for one in nodes):
            return False
        if any(one.ours for one in self.machine.pools) or any(one.ours for one in self.machine.runtime_configs):
            return False
        return not (self.our_classes or self.ours or self.labelled or self.machine.monitors)

    # nodes

    def _plan_node(self, node: NodeView) -> MachinePlan:
        leaving = self.config.leaving
        place = member_of(node.labels, self.machine)
        users = tuple(sorted(self.on_node[node.name]))
        if not leaving and is_chosen(self.spec, node, self.target, self.machine):
            if self.target == POOL:  # as it would be, lest two pools claim it
                joined = member_of({**node.labels, POOL_ROLE: ""}, self.machine)
                place = joined if joined.conflict else place
            return plan_machine(node, place, self._carries(place.pool), self._wish(node, users))
        if leaving:
            users = tuple(one.name for one in self.scene.users or ())
        shared = self.role == WORKER and self.target == POOL and not leaving  # it is still for all workers
        known = self.scene.users is not None
        open_class = any(one.ours and one.selector.get(READY_LABEL) != CLOSED for one in self.scene.classes)
        closed = known and not (leaving and open_class)
        free = known and not (leaving and self.our_classes) and not shared
        return plan_leaving(node, place, self._names_ours(place.pool), users=users, closed=closed, free=free)

    def _wish(self, node: NodeView, users: tuple[str, ...]) -> Wish:
        member = self.target == POOL
        if member:
            moves = self._carries(self.pools.get(POOL)) and not self.spec.rollout.paused
        else:
            without = {key: value for key, value in node.labels.items() if key != POOL_ROLE}
            to: Member = member_of(without, self.machine)
            moves = self._carries(to.pool) and self.scene.users is not None and not users
        return Wish(str(self.content), frozenset(map(handler_of, self.classes)), member, moves)

    def _carries(self, found: PoolView | None) -> bool:
        """Whether nodes of the pool get the runtime, and will go on to: it may be rendered anew at any moment."""
        config = self.rendered.get(found.config) if found is not None else None
        if found is None or config is None or not self.content.is_in(config):
            return False
        return any(self.content.is_in(one) and selects_roles(found, one.role) for one in self.ours if not one.leaving)

    def _names_ours(self, found: PoolView | None) -> bool:
        """Whether nodes of the pool get something of ours, or will."""
        if found is None:
            return False
        return any(one.name in found.sources or selects_roles(found, one.role) for one in self.ours) or any(
            name in found.sources for name in (EXTENSION_CONFIG, IMAGE_CONFIG)
        )

    # objects

    def _wanted_role(self) -> str:
        """Of the MachineConfig. From all workers to some of them it moves when those are in our pool, and the others'
        pods have ended; our pool takes what is for workers, too.
        """
        if self.role != WORKER or self.target != POOL:
            return self.target
        chosen = [one for one in self.scene.nodes if is_chosen(self.spec, one, self.target, self.machine)]
        names = {one.name for one in chosen}
        others = [one for one in self.scene.nodes if one.record is not None and one.name not in names]
        moved = all(is_member(one) or member_of(one.labels, self.machine).conflict for one in chosen)
        held = [one for one in others if READY_LABEL in one.labels or self.on_node[one.name]]
        known = self.scene.users is not None or not others
        return POOL if moved and known and not held else WORKER

    def _objects(self, role: str, nodes: list[MachinePlan]) -> Iterator[Change]:
        if self.config.leaving:
            yield from self._removals(nodes)
            return
        yield from self._pool_changes(nodes)
        yield from self._monitor_changes()
        wanted = {self.content.name} | ({LOG_CONFIG} if self.spec.log_level != "info" else set())
        if self.spec.rollout.paused:
            return
        if wanted & {LOG_CONFIG}:
            yield from self._log_changes(role)
        found = next((one for one in self.ours if one.name == self.content.name), None)
        body = machine_config(self.content, role, self.config.name)
        if found is None:
            yield ApplyObject("MachineConfig", self.content.name, body, new=True)
        elif found.role != role or not self.content.is_in(found):
            yield ApplyObject("MachineConfig", self.content.name, body, new=False)
        yield from _delete(self.machine, *wanted, *(one.name for one in self.machine.monitors))

    def _pool_changes(self, nodes: list[MachinePlan]) -> Iterator[Change]:
        found = self.pools.get(POOL)
        if self.target != POOL:
            yield from self._pool_removal(nodes)
            return
        rollout = self.spec.rollout
        proven = any(one.plan.phase == Phase.READY for one in nodes)
        limit = 1 if rollout.canary and not proven else rollout.max_unavailable
        if found is None:
            if not rollout.paused:
                yield ApplyObject("MachineConfigPool", POOL, pool(limit, held=None), new=True)
            return
        held = rollout.paused if rollout.paused != found.held else None
        if held and found.paused:
            held = None  # somebody else has paused it already, and will end that
        selectors = found.config_selector, found.node_selector
        right = selectors == (POOL_CONFIGS, POOL_NODES) and POOL_LABEL + POOL in found.labels
        if found.max_unavailable != str(limit) or held is not None or not right:
            yield ApplyObject("MachineConfigPool", POOL, pool(limit, held=held), new=False)

    def _pool_removal(self, nodes: list[MachinePlan]) -> Iterator[Change]:
        """Once no node is in it, and none has or takes what was rendered for it: that goes with the pool."""
        found = self.pools.get(POOL)
        if found is None or not found.ours or found.leaving or found.machines or self.labelled:
            return
        states = [one.plan.node.machine for one in nodes]
        if not any(name.startswith(f"rendered-{POOL}-") for one in states for name in (one.current, one.desired)):
            yield DeleteObject("MachineConfigPool", POOL)

    def _log_changes(self, role: str) -> Iterator[Change]:
        found = next(iter(self.machine.runtime_configs), None)
        body = log_config(self.spec.log_level, role)
        if found is None:
            yield ApplyObject("ContainerRuntimeConfig", LOG_CONFIG, body, new=True)
        elif (found.log_level, found.pools) != (self.spec.log_level, {POOL_LABEL + role: ""}):
            selected = body["spec"]["machineConfigPoolSelector"]["matchLabels"]
            selected |= {key: None for key in found.pools if key not in selected}
            yield ApplyObject("ContainerRuntimeConfig", LOG_CONFIG, body, new=False)

    def _monitor_changes(self) -> Iterator[Change]:
        found = next(iter(self.machine.monitors), None)
        if not self.settings.monitor_image:
            if found is not None and not found.leaving:
                yield DeleteObject("DaemonSet", found.name)
            return
        body = monitor(self.settings)
        if found is None or found.content != body["metadata"]["annotations"][CONTENT]:
            yield ApplyObject("DaemonSet", body["metadata"]["name"], body, new=found is None)

    def _removals(self, nodes: list[MachinePlan]) -> Iterator[Change]:
        """At deletion, once no pod, RuntimeClass or label of a node is left."""
        held = self.scene.users is None or self.scene.users or self.our_classes or self.labelled
        if held or any(READY_LABEL in one.plan.node.labels for one in nodes):
            return
        yield from _delete(self.machine)
        if not self.ours:
            yield from self._pool_removal(nodes)

    # RuntimeClasses

    def _class_changes(self, nodes: list[MachinePlan]) -> Iterator[Change]:
        """They come when a node is done; when they are to go, they are closed to new pods first."""
        leaving = self.config.leaving
        there = {one.name: one for one in self.scene.classes}
        wanted = {one.name: one for one in self.classes}
        in_use = {one.runtime_class for one in self.scene.users or ()}
        usable = any(one.plan.phase == Phase.READY for one in nodes)
        for name, one in wanted.items():
            found = there.get(name)
            body = pool_class(one, self.target, closed=leaving)
            if found is None:
                if usable and not leaving:
                    yield ApplyClass(body, new=True)
            elif found.ours and found.handler == body["handler"]:
                selector, overhead = body["scheduling"]["nodeSelector"], body["overhead"]["podFixed"]
                if found.selector != selector or not same(found.overhead, overhead):
                    yield ApplyClass(body, new=False)
        for name, found in there.items():
            kept = name in wanted and handler_of(wanted[name]) == found.handler  # which cannot be changed in place
            if not found.ours or (kept and not leaving):
                continue
            if found.selector.get(READY_LABEL) != CLOSED:
                if not kept:
                    yield ApplyClass(closed_class(found), new=False)
            elif self.scene.users is not None and not (self.scene.users if leaving else name in in_use):
                yield DeleteClass(name)

    # the situation

    def _situation(self, nodes: list[MachinePlan]) -> Situation:
        plans = tuple(one.plan for one in nodes if one.plan.phase)
        wanted = {one.name for one in self.classes}
        leaving = self.config.leaving
        unseen = any(one.unseen for one in nodes) or (not leaving and not self.ours)
        return Situation(
            spec=msgspec.structs.replace(self.spec, runtime_classes=self.classes),
            nodes=plans,
            busy=frozenset(one.node.name for one in plans if one.busy),
            classes=tuple(sorted(self.our_classes & wanted)),
            foreign=tuple(sorted(wanted & {one.name for one in self.scene.classes} - self.our_classes)),
            users=tuple(one.name for one in self.scene.users or ()) if leaving else (),
            backend="MachineConfig",
            held=self._held(nodes),
            trouble=self._trouble(nodes),
            detail=self._counts(nodes),
            waiting_for_mco=unseen,
            updating=_is_updating(self.config, self.scene.nodes),
        )

    def _held(self, nodes: list[MachinePlan]) -> str:
        """Who has paused what nodes wait for."""
        waits = any(one.plan.phase == Phase.WAITING for one in nodes)
        if waits and self.spec.rollout.paused and not self.config.leaving:
            return "spec.rollout.paused"
        names = sorted({one.held for one in nodes if one.held})
        return f"MachineConfigPool {', '.join(names)}: spec.paused" if names else ""

    def _trouble(self, nodes: list[MachinePlan]) -> tuple[str, str] | None:
        """What a pool or CRI-O's settings fail for, where no node says so."""
        failed = any(one.plan.phase in (Phase.FAILED, Phase.STUCK) for one in nodes)
        for found in self._pools_of(nodes):
            why = found.unrendered or ("" if failed else found.degraded)
            if why:
                return "PoolDegraded", f"MachineConfigPool {found.name}: {why}"
        for one in self.machine.runtime_configs:
            if one.ours and one.problem:
                return "LogLevelFailed", f"ContainerRuntimeConfig {one.name}: {one.problem}"
        return None

    def _counts(self, nodes: list[MachinePlan]) -> str:
        return "; ".join(
            f"MachineConfigPool {one.name}: {one.updated_machines} of {one.machines} machines are updated"
            for one in self._pools_of(nodes)
        )

    def _pools_of(self, nodes: list[MachinePlan]) -> list[PoolView]:
        """Those that our nodes are in, and the one that they are to be in."""
        places = [member_of(one.plan.node.labels, self.machine).pool for one in nodes if one.plan.phase]
        names = {one.name for one in places if one is not None} | {self.target}
        return [self.pools[name] for name in sorted(names) if name in self.pools]


def _is_updating(config: ConfigView, nodes: tuple[NodeView, ...]) -> bool:
    """Whether all had come to rest before: upstream tells a first installation from what comes later."""
    before = next((one for one in config.status.conditions if one.type == "InProgress"), None)
    rested = before is not None and (before.status == "False" or before.reason == "Updating")
    return rested and any(READY_LABEL in one.labels for one in nodes)


def _node_changes(nodes: list[MachinePlan]) -> Iterator[Change]:
    for one in nodes:
        patch: dict[str, Any] = {"metadata": {"labels": {}, "annotations": {}}}
        if one.plan.write is not None:
            record, ready = one.plan.write
            patch = node_change(one.plan.node, record, ready=ready)
        if one.member is not None:
            patch["metadata"]["labels"][POOL_ROLE] = "" if one.member else None
        if one.plan.write is not None or one.member is not None:
            yield ChangeNode(one.plan.node.name, patch)
