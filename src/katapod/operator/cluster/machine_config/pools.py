"""Which pool takes the runtime, which pool a node is in, and which nodes are chosen. Pure.

Source: OpenShift's machine-config operator, MachineConfigPools: a node is in one custom pool, else in `worker`; nodes
that `master` selects are in no other pool.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from katapod.model.kataconfig import Selector, Spec
from katapod.operator.cluster.machine_config.names import MASTER, NODE_ROLE, POOL, POOL_ROLE, ROLE, WORKER
from katapod.operator.cluster.machine_config.views import MachineObjects, PoolView
from katapod.operator.cluster.selectors import selects
from katapod.operator.cluster.views import NodeView
from katapod.operator.names import ELIGIBLE

__all__ = ["Member", "is_chosen", "is_converged", "is_member", "member_of", "selects_roles", "target_pool"]


@dataclass(frozen=True, slots=True)
class Member:
    """Of which pool a node is a member; `conflict` says why of none."""

    pool: PoolView | None
    conflict: str = ""


def is_converged(pools: Iterable[PoolView]) -> bool:
    """Whether all nodes are masters, as on a compact cluster or a single node."""
    counts = {one.name: one.machines for one in pools}
    return set(counts) == {MASTER, WORKER} and counts[WORKER] == 0


def target_pool(spec: Spec, machine: MachineObjects) -> str:
    """The pool that takes the runtime; a part of the workers needs one of its own."""
    if is_converged(machine.pools):
        return MASTER
    whole = spec.kata_config_pool_selector is None and not spec.check_node_eligibility
    return WORKER if whole else POOL


def is_member(node: NodeView) -> bool:
    """Whether the node has the label of our pool."""
    return POOL_ROLE in node.labels


def member_of(labels: dict[str, str], machine: MachineObjects) -> Member:
    found = {one.name: one for one in machine.pools if _selects(one.node_selector, labels)}
    if MASTER in found:
        return Member(found[MASTER])
    custom = sorted(name for name in found if name != WORKER)
    if len(custom) > 1:
        return Member(
            None, f"a node can be in one custom MachineConfigPool only, and this one belongs to {', '.join(custom)}"
        )
    return Member(found.get(custom[0] if custom else WORKER))


def _selects(selector: Selector | None, labels: dict[str, str]) -> bool:
    """An empty one of a pool selects nothing."""
    return selector is not None and selector != Selector() and selects(selector, labels)


def selects_roles(pool: PoolView, role: str) -> bool:
    """Whether a MachineConfig with this role goes to the pool's nodes."""
    return _selects(pool.config_selector, {ROLE: role})


def is_chosen(spec: Spec, node: NodeView, target: str, machine: MachineObjects) -> bool:
    """Whether the node is to have the runtime."""
    if target == POOL:
        without = {key: value for key, value in node.labels.items() if key != POOL_ROLE}
        pool = member_of(without, machine).pool
        worker = NODE_ROLE + WORKER in node.labels and (pool is None or pool.name != MASTER)
        eligible = not spec.check_node_eligibility or node.labels.get(ELIGIBLE) == "true"
        return worker and eligible and selects(spec.kata_config_pool_selector, node.labels)
    pool = member_of(node.labels, machine).pool
    return pool is not None and (pool.name == POOL or selects_roles(pool, target))
