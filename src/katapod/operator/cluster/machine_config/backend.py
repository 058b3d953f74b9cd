"""Which back end a KataConfig has, and what speaks against it. Pure.

It is chosen once, and shown in the status: what one has put on nodes, another cannot take away.
"""

from collections.abc import Iterable
from typing import Literal

from katapod.model.kataconfig import Spec
from katapod.operator.cluster.machine_config.names import (
    API_GROUP,
    EXTENSION_CONFIG,
    IMAGE_CONFIG,
    LOG_CONFIG,
    MASTER,
    POOL,
)
from katapod.operator.cluster.machine_config.pools import is_chosen, target_pool
from katapod.operator.cluster.machine_config.views import MachineObjects
from katapod.operator.cluster.selectors import selects
from katapod.operator.cluster.views import ConfigView, NodeView
from katapod.operator.names import ELIGIBLE
from katapod.operator.report import ACCELERATORS

__all__ = ["Chosen", "backend_of", "problem_of_backend"]

Chosen = Literal["MachineConfig", "NodeJobs"]
COREOS = "CoreOS"


def backend_of(config: ConfigView, spec: Spec, nodes: Iterable[NodeView], machine: MachineObjects | None) -> Chosen:
    """The one it has; else the one it asks for; else what this cluster has."""
    if config.status.backend in ("MachineConfig", "NodeJobs"):
        return "MachineConfig" if config.status.backend == "MachineConfig" else "NodeJobs"
    if machine is not None and any(one.ours for one in machine.configs):
        return "MachineConfig"  # somebody has emptied the status
    if spec.backend != "Auto":
        return spec.backend
    return "MachineConfig" if machine is not None and any(COREOS in one.system for one in nodes) else "NodeJobs"


def problem_of_backend(
    spec: Spec, backend: Chosen, nodes: tuple[NodeView, ...], machine: MachineObjects | None, *, leaving: bool
) -> str:
    """Why it cannot be; empty if nothing speaks against it."""
    if backend == "MachineConfig" and machine is None:
        return (
            f"spec.backend: MachineConfig needs the API group {API_GROUP}, which this cluster did not serve when the "
            "operator began; take NodeJobs, or restart the operator once it is served"
        )
    if leaving:
        return ""
    if spec.backend not in ("Auto", backend):
        return f"spec.backend: it has {backend}, and cannot change to {spec.backend}: delete it, and make a new one"
    if backend == "NodeJobs" or machine is None:
        return _not_with_jobs(spec)
    return _not_with_machine_config(spec, nodes, machine)


def _not_with_jobs(spec: Spec) -> str:
    if spec.log_level != "info":
        return "spec.logLevel: it is CRI-O's, and with the back end NodeJobs nothing would set it; leave it at info"
    return ""


def _not_with_machine_config(spec: Spec, nodes: tuple[NodeView, ...], machine: MachineObjects) -> str:
    if set(spec.accelerators) != set(ACCELERATORS):
        return "spec.accelerators: with the back end MachineConfig nothing is tried on nodes; leave it at its default"
    if all(one.accelerator for one in spec.runtime_classes):
        return "spec.runtimeClasses: with the back end MachineConfig only those without an accelerator are made"
    if problem := _needs_jobs(spec):
        return problem
    objects = [("MachineConfig", one.name, one.ours) for one in machine.configs]
    objects += [("MachineConfigPool", one.name, one.ours) for one in machine.pools]
    objects += [("ContainerRuntimeConfig", one.name, one.ours) for one in machine.runtime_configs]
    for kind, name, ours in objects:
        if not ours and name in (EXTENSION_CONFIG, IMAGE_CONFIG, POOL, LOG_CONFIG):
            return f"somebody else has made the {kind} {name}: another operator, or an earlier one, looks after nodes"
    if target_pool(spec, machine) == MASTER:
        return _not_all_masters(spec, nodes, machine)
    return ""


def _needs_jobs(spec: Spec) -> str:
    """Nodes have what their OS brings: nothing else is written there, nor measured."""
    told = "needs the back end NodeJobs: with MachineConfig nodes have what their OS brings"
    if spec.configuration.strip():
        return f"spec.configuration: {told}"
    for index, one in enumerate(spec.runtime_classes):
        if one.configuration.strip():
            return f"spec.runtimeClasses[{index}].configuration: {told}"
        if one.overhead.mode == "measured":
            return f"spec.runtimeClasses[{index}].overhead.mode: {one.overhead.mode} {told}"
    return ""


def _not_all_masters(spec: Spec, nodes: tuple[NodeView, ...], machine: MachineObjects) -> str:
    """The pool of a cluster without workers cannot be divided: masters are in no other."""
    members = [one for one in nodes if is_chosen(Spec(), one, MASTER, machine)]
    if not all(selects(spec.kata_config_pool_selector, one.labels) for one in members):
        return f"spec.kataConfigPoolSelector: all nodes here are in the pool {MASTER}, which gets it as a whole"
    if spec.check_node_eligibility and not all(one.labels.get(ELIGIBLE) == "true" for one in members):
        return f"spec.checkNodeEligibility: all nodes here are in the pool {MASTER}, and not all have {ELIGIBLE}=true"
    return ""
