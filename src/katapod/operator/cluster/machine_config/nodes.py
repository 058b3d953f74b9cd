"""What to do about one node: pure, from its labels, its machine-config daemon's annotations and its pool.

The lists of the status follow upstream's table: the daemon's state, whether the node has what its pool is to have, and
whether it is to have the runtime. What a pool is to have is looked for in the rendered MachineConfig itself, so a pool
that has not heard of a change yet is not taken for one that is done.
"""

from dataclasses import dataclass

import msgspec

from katapod.operator.cluster.machine_config.pools import Member, is_member
from katapod.operator.cluster.node_plan import NodePlan, Phase
from katapod.operator.cluster.views import NodeView, Record
from katapod.operator.names import READY, READY_LABEL

__all__ = ["MachinePlan", "Wish", "plan_leaving", "plan_machine"]

DONE, FAILED = "Done", ("Degraded", "Unreconcilable")


@dataclass(frozen=True, slots=True)
class Wish:
    """What a chosen node is to have, and how it comes by it."""

    content: str
    handlers: frozenset[str]  # that RuntimeClasses name
    member: bool  # of our pool
    moves: bool  # the pool that it is to be in is ready to take it


@dataclass(frozen=True, slots=True)
class MachinePlan:
    plan: NodePlan
    member: bool | None = None  # whether it gets the label of our pool, or loses it; None: as it is
    unseen: bool = False  # the machine-config operator has not answered our last change yet
    held: str = ""  # the paused pool that it waits for


def plan_machine(node: NodeView, place: Member, carries: bool, wish: Wish) -> MachinePlan:
    """A chosen node. `carries`: whether its pool's rendered MachineConfig has what it is to have."""
    if place.conflict:
        return MachinePlan(_claimed(node, Phase.FAILED, place.conflict))
    move = wish.member if wish.moves and wish.member != is_member(node) else None
    state, pool = node.machine, place.pool
    if pool is None or not state.state:
        why = "its machine-config daemon has not told of it" if pool else "it is in no MachineConfigPool"
        return MachinePlan(_claimed(node, Phase.WAITING, why), move)
    if state.state in FAILED:
        return MachinePlan(_claimed(node, Phase.FAILED, state.reason or state.state), move)
    if state.state != DONE:
        return MachinePlan(_claimed(node, Phase.INSTALLING, f"MachineConfigPool {pool.name}", busy=True), move)
    if state.current != pool.config:
        why = (
            f"MachineConfigPool {pool.name} is paused" if pool.paused else f"its turn in MachineConfigPool {pool.name}"
        )
        return MachinePlan(_claimed(node, Phase.WAITING, why), move, held=pool.name if pool.paused else "")
    if carries:
        return MachinePlan(_installed(node, wish), move)
    if move is not None:
        return MachinePlan(_claimed(node, Phase.WAITING, "joins its MachineConfigPool"), move, unseen=True)
    return MachinePlan(_claimed(node, Phase.WAITING, "the machine-config operator renders its pool"), unseen=True)


def _claimed(node: NodeView, phase: Phase, message: str, *, busy: bool = False) -> NodePlan:
    """Marked before it can be changed: whoever finds it later knows that it has to be looked after."""
    write = None if node.record is not None else (Record(dirty=True), False)
    return NodePlan(node, phase, message, write=write, busy=busy)


def _installed(node: NodeView, wish: Wish) -> NodePlan:
    done = node.record is not None and node.record.target == wish.content and not node.record.dirty
    labelled = node.labels.get(READY_LABEL) == READY
    if not node.ready:
        return NodePlan(node, Phase.NOT_READY, "the node is not Ready", write=_claimed(node, Phase.WAITING, "").write)
    missing = wish.handlers - node.handlers if node.handlers is not None else frozenset()
    if missing and not labelled:
        told = f"the kubelet does not list the handler {', '.join(sorted(missing))} yet"
        return NodePlan(node, Phase.SETTLING, told, write=_claimed(node, Phase.WAITING, "").write)
    if done and labelled:
        return NodePlan(node, Phase.READY)
    return NodePlan(node, Phase.SETTLING, write=(Record(target=wish.content), True))


def plan_leaving(
    node: NodeView, place: Member, named: bool, *, users: tuple[str, ...], closed: bool, free: bool
) -> MachinePlan:
    """A node that is not chosen. `named`: whether its pool's MachineConfigs include one of ours; `users`: pods of ours
    on it; `closed`: whether it may be closed to new ones; `free`: whether nothing else has to go before it.
    """
    record, pool, state = node.record, place.pool, node.machine
    if record is None and not is_member(node):
        return MachinePlan(NodePlan(node, None, write=(None, False) if READY_LABEL in node.labels else None))
    if users:
        return MachinePlan(NodePlan(node, Phase.LEAVING, f"waits for {', '.join(users[:10])}"))
    if READY_LABEL in node.labels:
        kept = msgspec.structs.replace(record, dirty=True) if record is not None else Record(dirty=True)
        return MachinePlan(NodePlan(node, Phase.LEAVING, write=(kept, False) if closed else None))
    if is_member(node):
        return MachinePlan(NodePlan(node, Phase.LEAVING), member=False if free else None)
    if state.state in FAILED:
        return MachinePlan(NodePlan(node, Phase.STUCK, state.reason or state.state))
    if pool is None or not state.state:
        return MachinePlan(NodePlan(node, None, write=(None, False)))
    if state.state != DONE:
        return MachinePlan(NodePlan(node, Phase.UNINSTALLING, f"MachineConfigPool {pool.name}", busy=True))
    if state.current != pool.config:
        why = (
            f"MachineConfigPool {pool.name} is paused" if pool.paused else f"its turn in MachineConfigPool {pool.name}"
        )
        return MachinePlan(NodePlan(node, Phase.LEAVING, why), held=pool.name if pool.paused else "")
    if named:
        told = "the machine-config operator renders its pool" if free else "others come first"
        return MachinePlan(NodePlan(node, Phase.LEAVING, told), unseen=free)
    return MachinePlan(NodePlan(node, None, write=(None, False)))
