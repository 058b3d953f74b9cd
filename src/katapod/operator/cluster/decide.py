"""From what a cluster has to what is to be done next, and to the status: pure. Called again after every change."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime

import msgspec

from katapod.model.kataconfig import Spec, Status
from katapod.operator.cluster.changes import (
    ApplyClass,
    Change,
    ChangeConfig,
    ChangeNode,
    CreateJob,
    DeleteClass,
    DeleteJob,
    EvictPod,
)
from katapod.operator.cluster.machine_config.backend import Chosen, backend_of, problem_of_backend
from katapod.operator.cluster.machine_config.plan import Scene, give_up, needs_users, plan_pools
from katapod.operator.cluster.machine_config.views import MachineObjects
from katapod.operator.cluster.node_plan import Draining, NodePlan, Phase, Wanted, is_chosen, is_labelled, plan_node
from katapod.operator.cluster.objects import (
    Settings,
    class_selector,
    closed_class,
    node_change,
    node_job,
    runtime_class,
)
from katapod.operator.cluster.profiles import handler_of, node_settings, overhead_of, wanted_target
from katapod.operator.cluster.quantities import same
from katapod.operator.cluster.status import Situation, describe
from katapod.operator.cluster.validation import problems_of
from katapod.operator.cluster.views import ClassView, ConfigView, JobView, NodeView, PodView, Record, UserPod
from katapod.operator.handlers import NodeSettings
from katapod.operator.names import CLOSED, FINALIZER, FORCE, READY_LABEL

__all__ = ["Observed", "Plan", "by_age", "decide", "needs_pods"]


@dataclass(frozen=True, slots=True)
class Observed:
    """What is there. `users`: pods in sandboxes, of any RuntimeClass; None if needs_pods() has seen no need."""

    configs: tuple[ConfigView, ...]
    nodes: tuple[NodeView, ...]
    jobs: tuple[JobView, ...]
    pods: tuple[PodView, ...]
    classes: tuple[ClassView, ...]
    users: tuple[UserPod, ...] | None
    now: datetime
    refused: Mapping[str, str] = field(default_factory=dict)  # pods that may not be evicted now, by name: why
    machine: MachineObjects | None = None  # None: the cluster has no machine-config operator


@dataclass(frozen=True, slots=True)
class Plan:
    changes: tuple[Change, ...] = ()
    statuses: dict[str, Status] = field(default_factory=dict)  # by the KataConfig's name
    wake: datetime | None = None  # when to decide again though nothing has changed
    nodes: tuple[NodePlan, ...] = ()  # those that have something to do with us


def decide(observed: Observed, settings: Settings) -> Plan:
    """Of several KataConfigs the oldest counts."""
    if not observed.configs:
        return Plan()
    first, *others = by_age(observed)
    plan = _decide(first, observed, settings)
    changes, statuses = list(plan.changes), dict(plan.statuses)
    for other in others:
        statuses[other.name] = describe(other, Situation(invalid=f"there is one already: {first.name}"), observed.now)
        changes += _hold(other, False)
    return Plan(tuple(changes), statuses, plan.wake, plan.nodes)


def needs_pods(observed: Observed, settings: Settings) -> bool:
    """Whether something is to be taken away that pods may use."""
    for config in by_age(observed)[:1]:
        spec = config.spec or Spec()
        if observed.machine is not None and _backend(config, spec, observed) == "MachineConfig":
            return needs_users(config, spec, _scene(observed, observed.machine))
        return (
            config.leaving
            or any(node.record is not None and not is_chosen(spec, node) for node in observed.nodes)
            or any(one.ours and not _is_wanted(spec, one) for one in observed.classes)
            or (spec.rollout.drain and _is_drained(spec, observed, settings))
        )
    return False


def _is_wanted(spec: Spec, found: ClassView) -> bool:
    """A handler cannot be changed in place."""
    return any((one.name, handler_of(one)) == (found.name, found.handler) for one in spec.runtime_classes)


def _is_drained(spec: Spec, observed: Observed, settings: Settings) -> bool:
    target = wanted_target(settings.target, node_settings(spec))
    records = [node.record for node in observed.nodes if node.record is not None]
    return any(one.drain or one.target not in ("", target) for one in records)


def by_age(observed: Observed) -> list[ConfigView]:
    return sorted(observed.configs, key=lambda one: (one.created, one.name))


def _backend(config: ConfigView, spec: Spec, observed: Observed) -> Chosen:
    return backend_of(config, spec, observed.nodes, observed.machine)


def _scene(observed: Observed, machine: MachineObjects) -> Scene:
    ours = {one.name for one in observed.classes if one.ours}
    users = observed.users
    if users is not None:
        users = tuple(one for one in users if one.runtime_class in ours)
    return Scene(observed.nodes, observed.classes, users, machine)


def _hold(config: ConfigView, hold: bool) -> list[Change]:
    """Whether deletion waits for us."""
    kept = tuple(one for one in config.finalizers if one != FINALIZER)
    wanted = (*kept, FINALIZER) if hold else kept
    return [] if set(wanted) == set(config.finalizers) else [ChangeConfig(config.name, wanted)]


def _decide(config: ConfigView, observed: Observed, settings: Settings) -> Plan:
    spec = config.spec or Spec()
    backend = _backend(config, spec, observed)
    refused = problem_of_backend(spec, backend, observed.nodes, observed.machine, leaving=config.leaving)
    problem = config.problem or "; ".join(filter(None, (*problems_of(spec), refused)))
    if config.leaving:
        if FINALIZER not in config.finalizers:
            return Plan()
        if config.annotations.get(FORCE) == "true":
            return Plan((*_give_up(observed), *_hold(config, False)))
        if refused:
            return Plan((), {config.name: describe(config, Situation(invalid=refused), observed.now)})
    elif problem:
        return Plan((), {config.name: describe(config, Situation(invalid=problem), observed.now)})
    elif FINALIZER not in config.finalizers:  # first, so that nothing can be left behind
        return Plan(tuple(_hold(config, True)))
    if backend == "MachineConfig" and observed.machine is not None:
        outcome = plan_pools(config, spec, _scene(observed, observed.machine), settings)
        free = _hold(config, False) if config.leaving and outcome.gone else []
        status = describe(config, outcome.situation, observed.now)
        return Plan((*outcome.changes, *free), {config.name: status}, nodes=outcome.situation.nodes)
    ours = {one.name for one in observed.classes if one.ours}
    wanted = {one.name for one in spec.runtime_classes}
    users = tuple(one for one in observed.users or () if one.runtime_class in ours)
    in_use = {one.runtime_class for one in users}
    wished = node_settings(spec, (one for one in observed.classes if one.name in in_use))
    nodes = _plan_nodes(config, spec, observed, settings, wished, users)
    started = _starts(nodes, spec, settings, wished, leaving=config.leaving)
    changes = [*_node_changes(nodes), *_orphans(nodes, observed)]
    changes += [change for some in started.values() for change in some]
    changes += _class_changes(config, spec, observed, nodes, users)
    if config.leaving and not ours and not observed.jobs and not any(one.phase or one.write for one in nodes):
        changes += _hold(config, False)
    situation = Situation(
        spec=spec,
        nodes=tuple(one for one in nodes if one.phase),
        busy=frozenset({one.node.name for one in nodes if one.busy} | set(started)),
        classes=tuple(sorted(ours & wanted)),
        foreign=tuple(sorted(wanted & {one.name for one in observed.classes} - ours)),
        users=tuple(one.name for one in users) if config.leaving else (),
        backend=backend,
    )
    wake = min((one.retry for one in nodes if one.retry and one.retry > observed.now), default=None)
    statuses = {config.name: describe(config, situation, observed.now)}
    return Plan(tuple(changes), statuses, wake, situation.nodes)


def _plan_nodes(
    config: ConfigView,
    spec: Spec,
    observed: Observed,
    settings: Settings,
    wished: NodeSettings,
    users: tuple[UserPod, ...],
) -> list[NodePlan]:
    wanted = Wanted(wanted_target(settings.target, wished), frozenset(one.name for one in wished.handlers))
    jobs = {one.node: one for one in observed.jobs}
    pods = {one.job: one for one in sorted(observed.pods, key=lambda one: one.created)}
    on_node: dict[str, list[UserPod]] = defaultdict(list)
    for one in users:
        on_node[one.node].append(one)
    everywhere = tuple(one.name for one in users)
    plans = []
    for node in sorted(observed.nodes, key=lambda one: one.name):
        job = jobs.get(node.name)
        here = tuple(sorted(on_node.get(node.name, ()), key=lambda one: one.name))
        plans.append(
            plan_node(
                node,
                job,
                pods.get(job.uid) if job is not None else None,
                wanted=wanted if not config.leaving and is_chosen(spec, node) else None,
                users=everywhere if config.leaving else tuple(one.name for one in here),
                draining=Draining(spec.rollout.drain, here, observed.refused),
                now=observed.now,
            )
        )
    return plans


def _node_changes(nodes: list[NodePlan]) -> Iterator[Change]:
    for one in nodes:
        if one.write is not None:
            yield ChangeNode(one.node.name, _patch(one, *one.write))
        for pod in one.evict:
            yield EvictPod(pod.name)
        if one.delete_job:
            yield DeleteJob(one.delete_job)


def _orphans(nodes: list[NodePlan], observed: Observed) -> Iterator[Change]:
    """Jobs of nodes that are no more."""
    there = {one.node.name for one in nodes}
    return (DeleteJob(job.name) for job in observed.jobs if job.node not in there and not job.leaving)


def _patch(plan: NodePlan, record: Record | None, ready: bool) -> dict[str, object]:
    return node_change(plan.node, record, ready=ready, cordon=plan.cordon)


def _starts(
    nodes: list[NodePlan], spec: Spec, settings: Settings, wished: NodeSettings, *, leaving: bool
) -> dict[str, list[Change]]:
    """What begins now, by node: as many as may be at work at once, those that have failed counted in."""
    target = wanted_target(settings.target, wished)
    proven = any(one.node.record is not None and one.node.record.target == target for one in nodes)
    limit = 1 if spec.rollout.canary and not proven and not leaving else spec.rollout.max_unavailable
    failed = sum(one.phase == Phase.FAILED and not one.start for one in nodes)
    begun = [one for one in nodes if one.start and one.begun]
    room = max(limit - sum(one.busy for one in nodes) - failed - len(begun), 0)
    if spec.rollout.paused and not leaving:
        room = 0
    waiting = [one for one in nodes if one.start and not one.busy and not one.begun]
    # those that have failed come last: others may succeed
    waiting.sort(key=lambda one: (one.phase in (Phase.FAILED, Phase.STUCK), one.node.name))
    found: dict[str, list[Change]] = {}
    for one in begun + waiting[:room]:
        record = one.node.record or Record()
        labelled = is_labelled(one.node) and bool(record.target)
        if one.start == "drain":
            record = msgspec.structs.replace(record, drain="found" if one.node.cordoned else "cordoned")
            found[one.node.name] = [
                ChangeNode(one.node.name, node_change(one.node, record, ready=labelled, cordon=True))
            ]
            continue
        # marked before the job is made: whoever finds the node later knows that something may be there
        claimed = node_change(one.node, msgspec.structs.replace(record, dirty=True), ready=labelled)
        body = node_job(settings, one.start, one.node, spec.accelerators, wished)
        found[one.node.name] = [ChangeNode(one.node.name, claimed), CreateJob(body)]
    return found


def _class_changes(
    config: ConfigView, spec: Spec, observed: Observed, nodes: list[NodePlan], users: tuple[UserPod, ...]
) -> Iterator[Change]:
    """RuntimeClasses come when a node has been proven; when they are to go, they are closed to new pods first."""
    there = {one.name: one for one in observed.classes}
    wanted = {one.name: one for one in spec.runtime_classes}
    in_use = {one.runtime_class for one in users}
    usable = any(one.phase == Phase.READY for one in nodes)
    proven = [one.node for one in nodes if one.phase]
    empty = not any(one.phase for one in nodes)  # nothing is on any node
    for name, one in wanted.items():
        found = there.get(name)
        if found is None:
            if usable and not config.leaving:
                yield ApplyClass(runtime_class(one, overhead_of(one, proven)), new=True)
        elif found.ours and _is_wanted(spec, found):
            selector = class_selector(one, closed=config.leaving)
            overhead = overhead_of(one, proven)
            if found.selector != selector or not same(found.overhead, overhead):
                yield ApplyClass(runtime_class(one, overhead, closed=config.leaving), new=False)
    for name, found in there.items():
        if not found.ours:
            continue
        unwanted = not _is_wanted(spec, found)
        if (unwanted and observed.users is not None and name not in in_use) or (config.leaving and empty and not users):
            yield DeleteClass(name)
        elif unwanted and found.selector.get(READY_LABEL) != CLOSED:
            yield ApplyClass(closed_class(found), new=False)


def _give_up(observed: Observed) -> Iterator[Change]:
    """By force: what the cluster knows of us goes at once, and what is on nodes stays there."""
    for job in observed.jobs:
        yield DeleteJob(job.name)
    for node in observed.nodes:
        if node.record is not None or is_labelled(node):
            cordon = False if node.record is not None and node.record.drain == "cordoned" else None
            yield ChangeNode(node.name, node_change(node, None, ready=False, cordon=cordon))
    for found in observed.classes:
        if found.ours:
            yield DeleteClass(found.name)
    if observed.machine is not None:
        yield from give_up(observed.machine, observed.nodes)
