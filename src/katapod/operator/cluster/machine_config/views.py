"""What the operator looks at of the machine-config operator's objects. Rendered MachineConfigs hold every file of a
node: of those, too, only a few words are kept.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from katapod.model.kataconfig import Selector
from katapod.operator.cluster.machine_config.names import (
    API_GROUP,
    CONTENT,
    HELD,
    LOG_CONFIG,
    MONITOR,
    POOL_LABEL,
    ROLE,
)
from katapod.operator.names import MANAGED_BY, MANAGER

__all__ = [
    "MACHINE_RESOURCES",
    "MachineConfigView",
    "MachineObjects",
    "MonitorView",
    "PoolView",
    "RuntimeConfigView",
    "machine_objects",
    "parse_machine_config",
    "parse_monitor",
    "parse_pool",
    "parse_runtime_config",
]

Body = Mapping[str, Any]
TEXT = 1000  # characters of a text that somebody else has written


class MachineConfigView(msgspec.Struct, frozen=True):
    name: str
    uid: str
    ours: bool
    role: str
    extensions: tuple[str, ...]
    os_image: str
    leaving: bool


class PoolView(msgspec.Struct, frozen=True):
    name: str
    uid: str
    ours: bool
    labels: dict[str, str]
    node_selector: Selector | None  # None: no node
    config_selector: Selector | None  # None: no MachineConfig
    max_unavailable: str
    paused: bool
    held: bool  # paused by us
    config: str  # the rendered MachineConfig that its nodes are to have; empty: none yet
    sources: tuple[str, ...]  # the MachineConfigs that this is made of
    machines: int
    updated_machines: int
    unavailable_machines: int
    unrendered: str  # why its MachineConfigs do not go together
    degraded: str  # why it is degraded at all
    leaving: bool


class RuntimeConfigView(msgspec.Struct, frozen=True):
    """A ContainerRuntimeConfig: CRI-O's settings on the nodes of a pool."""

    name: str
    uid: str
    ours: bool
    log_level: str
    pools: dict[str, str]  # the labels of pools that it selects
    problem: str
    leaving: bool


class MonitorView(msgspec.Struct, frozen=True):
    """kata-monitor's DaemonSet."""

    name: str
    uid: str
    content: str
    leaving: bool


@dataclass(frozen=True, slots=True)
class MachineObjects:
    configs: tuple[MachineConfigView, ...] = ()
    pools: tuple[PoolView, ...] = ()
    runtime_configs: tuple[RuntimeConfigView, ...] = ()
    monitors: tuple[MonitorView, ...] = ()

    def views(self) -> tuple[MachineConfigView | PoolView | RuntimeConfigView | MonitorView, ...]:
        return (*self.configs, *self.pools, *self.runtime_configs, *self.monitors)


def _is_ours(meta: Body) -> bool:
    return (meta.get("labels") or {}).get(MANAGED_BY) == MANAGER


def parse_machine_config(body: Body) -> MachineConfigView:
    meta, spec = body["metadata"], body.get("spec") or {}
    return MachineConfigView(
        name=meta["name"],
        uid=meta["uid"],
        ours=_is_ours(meta),
        role=(meta.get("labels") or {}).get(ROLE, ""),
        extensions=tuple(map(str, spec.get("extensions") or ())),
        os_image=str(spec.get("osImageURL") or ""),
        leaving="deletionTimestamp" in meta,
    )


def parse_pool(body: Body) -> PoolView:
    meta, spec, status = body["metadata"], body.get("spec") or {}, body.get("status") or {}
    rendered = spec.get("configuration") or {}
    told = {one.get("type"): one for one in status.get("conditions") or () if one.get("status") == "True"}
    labels = dict(meta.get("labels") or {})
    return PoolView(
        name=meta["name"],
        uid=meta["uid"],
        ours=_is_ours(meta),
        labels={key: value for key, value in labels.items() if key.startswith(POOL_LABEL)},
        node_selector=_selector(spec.get("nodeSelector")),
        config_selector=_selector(spec.get("machineConfigSelector")),
        max_unavailable=str(spec.get("maxUnavailable") or 1),
        paused=bool(spec.get("paused")),
        held=(meta.get("annotations") or {}).get(HELD) == "true",
        config=str(rendered.get("name") or ""),
        sources=tuple(str(one.get("name", "")) for one in rendered.get("source") or ()),
        machines=int(status.get("machineCount") or 0),
        updated_machines=int(status.get("updatedMachineCount") or 0),
        unavailable_machines=int(status.get("unavailableMachineCount") or 0),
        unrendered=_message(told.get("RenderDegraded")),
        degraded=_message(told.get("Degraded")),
        leaving="deletionTimestamp" in meta,
    )


def _message(condition: Body | None) -> str:
    if condition is None:
        return ""
    return str(condition.get("message") or condition.get("reason") or "it does not say why")[:TEXT]


def _selector(value: Body | None) -> Selector | None:
    """One that we cannot read selects nothing."""
    if value is None:
        return None
    try:
        return msgspec.convert({key: one for key, one in value.items() if one is not None}, Selector)
    except msgspec.ValidationError:
        return None


def parse_runtime_config(body: Body) -> RuntimeConfigView | None:
    """None for one of another name."""
    meta, spec = body["metadata"], body.get("spec") or {}
    if meta["name"] != LOG_CONFIG:
        return None
    conditions = (body.get("status") or {}).get("conditions") or ()
    failed = [one for one in conditions[-1:] if one.get("type") == "Failure" and one.get("status") == "True"]
    return RuntimeConfigView(
        name=meta["name"],
        uid=meta["uid"],
        ours=_is_ours(meta),
        log_level=str((spec.get("containerRuntimeConfig") or {}).get("logLevel") or ""),
        pools=dict((spec.get("machineConfigPoolSelector") or {}).get("matchLabels") or {}),
        problem=_message(failed[0]) if failed else "",
        leaving="deletionTimestamp" in meta,
    )


def parse_monitor(body: Body) -> MonitorView | None:
    """None for a DaemonSet that is not ours."""
    meta = body["metadata"]
    if meta["name"] != MONITOR or not _is_ours(meta):
        return None
    content = (meta.get("annotations") or {}).get(CONTENT, "")
    return MonitorView(meta["name"], meta["uid"], content, leaving="deletionTimestamp" in meta)


MACHINE_RESOURCES: dict[str, tuple[tuple[str, str, str], Callable[[Body], Any]]] = {
    "machine_configs": ((API_GROUP, "v1", "machineconfigs"), parse_machine_config),
    "machine_pools": ((API_GROUP, "v1", "machineconfigpools"), parse_pool),
    "machine_runtimes": ((API_GROUP, "v1", "containerruntimeconfigs"), parse_runtime_config),
    "machine_monitors": (("apps", "v1", "daemonsets"), parse_monitor),
}
"""What is watched beside the rest where there is a machine-config operator."""


def machine_objects(views: Mapping[str, tuple[Any, ...]]) -> MachineObjects:
    """From views by the names of MACHINE_RESOURCES."""
    return MachineObjects(*(views.get(kind, ()) for kind in MACHINE_RESOURCES))
