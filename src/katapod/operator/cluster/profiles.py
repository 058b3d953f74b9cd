"""RuntimeClasses as profiles: which runtime handlers nodes need for them, and what a pod of one costs. Pure."""

from collections.abc import Iterable

from katapod.model.kataconfig import RuntimeClassSpec, Spec
from katapod.operator.cluster.views import ClassView, NodeView
from katapod.operator.handlers import HandlerSpec, NodeSettings
from katapod.operator.names import HANDLER

__all__ = ["handler_of", "node_settings", "overhead_of", "wanted_target"]


def handler_of(one: RuntimeClassSpec) -> str:
    """A class with a configuration of its own has a handler of its own."""
    return one.handler or (one.name if one.configuration else HANDLER)


def node_settings(spec: Spec, classes: Iterable[ClassView] = ()) -> NodeSettings:
    """What nodes are to have. `classes`: those of the cluster; a handler of ours stays while there is a class of it,
    since containers of running pods are started anew by it."""
    found: dict[str, HandlerSpec] = {}
    for one in spec.runtime_classes:
        name = handler_of(one)
        before = found.get(name)
        measure = one.overhead.mode == "measured" or (before is not None and before.measure)
        drop_ins = tuple(text for text in (spec.configuration, one.configuration) if text.strip())
        found[name] = HandlerSpec(name, drop_ins, measure)
    for view in classes:
        if view.ours and view.handler not in found:
            found[view.handler] = HandlerSpec(view.handler, kept=True)
    return NodeSettings(tuple(found[name] for name in sorted(found)))


def wanted_target(target: str, settings: NodeSettings) -> str:
    """The payload and, where they are not the default ones, which settings: 0.1.0+8d3f2a6b1c04."""
    return "+".join(filter(None, (target, settings.digest())))


def overhead_of(one: RuntimeClassSpec, nodes: Iterable[NodeView]) -> dict[str, str]:
    """podFixed: what the spec says or, where nodes have measured it, the most that one has."""
    handler = handler_of(one)
    proofs = [node.record.proof for node in nodes if node.record is not None and node.record.proof is not None]
    found = [
        proof.measured[handler]
        for proof in proofs
        if handler in proof.measured and one.accelerator in (None, proof.accelerator)
    ]
    if one.overhead.mode == "fixed" or not found:
        return {"cpu": one.overhead.cpu, "memory": one.overhead.memory}
    memory, cpu = max(each.memory_mib for each in found), max(each.cpu_millis for each in found)
    return {"cpu": f"{cpu}m", "memory": f"{memory}Mi"}
