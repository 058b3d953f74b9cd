"""The loop: kopf watches and keeps what it has seen as views; after every change we decide anew, and carry it out.

Nothing is kept beside those views: what has been done is on the cluster's objects, so whoever starts after us, or
beside us, comes to the same decision.
"""

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import kopf
import msgspec

from katapod.model.kataconfig import Status
from katapod.operator.cluster.changes import ApplyObject, Change, DeleteObject, describe
from katapod.operator.cluster.client import ClusterClient, ClusterFailed
from katapod.operator.cluster.decide import Observed, Plan, decide, needs_pods
from katapod.operator.cluster.events import changes_of, event_object
from katapod.operator.cluster.machine_config.views import MACHINE_RESOURCES, MachineObjects, machine_objects
from katapod.operator.cluster.objects import Settings
from katapod.operator.cluster.views import parse_class, parse_config, parse_job, parse_node, parse_pod
from katapod.operator.names import GROUP
from katapod.tasks import Background

__all__ = ["Controller"]

log = logging.getLogger(__name__)

SETTLE_S = 0.2  # changes come in bursts
PODS_S = 5.0  # pods are looked for so often while something waits for their end
RETRY_S, RETRY_MAX_S = 1.0, 30.0

RESOURCES: dict[str, tuple[tuple[str, str, str], Callable[[Mapping[str, Any]], Any]]] = {
    "configs": ((GROUP, "v1", "kataconfigs"), parse_config),
    "nodes": (("", "v1", "nodes"), parse_node),
    "jobs": (("batch", "v1", "jobs"), parse_job),
    "pods": (("", "v1", "pods"), parse_pod),
    "classes": (("node.k8s.io", "v1", "runtimeclasses"), parse_class),
}


class Controller:
    def __init__(self, client: ClusterClient, settings: Settings, *, machine: bool = False) -> None:
        """`machine`: whether the cluster has a machine-config operator."""
        self._machine = machine
        self._resources = RESOURCES | (MACHINE_RESOURCES if machine else {})
        self._client = client
        self._settings = settings
        self._background = Background()
        self._changed = asyncio.Event()
        self._seen: dict[str, dict[str, Any]] = {kind: {} for kind in self._resources}  # views, by uid
        self._indices: Mapping[str, Any] = {}
        self._written: dict[str, Status] = {}  # by the KataConfig's uid: what it has, or will be seen to have
        self._gone: set[tuple[str, str]] = set()
        self.passes = 0  # how often something has been decided

    def register(self, registry: kopf.OperatorRegistry) -> None:
        """An index of each resource: kopf calls no handler until all of them are complete."""
        kopf.on.startup(registry=registry)(self._start)
        kopf.on.cleanup(registry=registry)(self._stop)
        kopf.on.probe(registry=registry, id="passes")(lambda **_: self.passes)
        for kind, (resource, parse) in self._resources.items():
            kopf.index(*resource, registry=registry, id=kind)(_indexer(parse))
            kopf.on.event(*resource, registry=registry, id=f"{kind}-changed")(self._watcher(kind))

    async def _start(self, **_: object) -> None:
        self._background.start(self._loop(), name="reconcile")

    async def _stop(self, **_: object) -> None:
        await self._background.close()
        await self._client.close()

    def _watcher(self, kind: str) -> Callable[..., Any]:
        """Wakes the loop when a view has changed: a node's heartbeat changes none."""
        seen = self._seen[kind]

        async def changed(uid: str, type: str | None, **kwargs: Any) -> None:
            self._indices = {one: kwargs[one] for one in self._resources}
            view = None if type == "DELETED" else next(iter(self._indices[kind].get(uid, ())), None)
            if view == seen.get(uid):
                return
            if view is None:
                del seen[uid]
            else:
                seen[uid] = view
            self._changed.set()

        return changed

    def _observe(self) -> Observed:
        views = {
            kind: tuple(view for uid in index if (uid, kind) not in self._gone for view in index[uid])
            for kind, index in self._indices.items()
        }
        machine = {kind: views.pop(kind) for kind in MACHINE_RESOURCES if kind in views}
        found = Observed(**views, users=None, now=datetime.now(UTC))  # type: ignore[arg-type]
        return dataclasses.replace(found, machine=machine_objects(machine)) if self._machine else found

    async def _loop(self) -> None:
        pause_s: float | None = None
        failures = 0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._changed.wait()
            await asyncio.sleep(SETTLE_S)
            self._changed.clear()
            try:
                pause_s = await self._pass()
                failures = 0
            except ClusterFailed as exc:
                pause_s = min(RETRY_S * 2**failures, RETRY_MAX_S)
                failures += 1
                log.warning("%s; again in %g s", exc, pause_s)

    async def _pass(self) -> float | None:
        """Decide, and carry it out; returns when to do it again at the latest. Raises ClusterFailed."""
        if not self._indices:
            return None
        observed = self._observe()
        asks = needs_pods(observed)
        if asks:
            observed = dataclasses.replace(observed, users=await self._client.sandboxed_pods())
        plan = decide(observed, self._settings)
        self.passes += 1
        await self._write_statuses(observed, plan)
        for change in plan.changes:
            log.info("%s", describe(change))
            if not await self._client.carry_out(change):
                self._forget(observed, change)
        waits = [PODS_S] if asks else []
        if plan.wake is not None:
            waits.append(max((plan.wake - observed.now).total_seconds(), 0))
        return min(waits, default=None)

    async def _write_statuses(self, observed: Observed, plan: Plan) -> None:
        for config in observed.configs:
            status = plan.statuses.get(config.name)
            if status is None or status == self._written.get(config.uid, config.status):
                continue
            if await self._client.write_status(config.name, msgspec.to_builtins(status)):
                before = self._written.get(config.uid, config.status)
                self._written[config.uid] = status
                for told in changes_of(before, status):
                    await self._client.post_event(event_object(config, told, observed.now))

    def _forget(self, observed: Observed, change: Change) -> None:
        """A deletion that no watch has told us of: one that was cut off, and came back too late."""
        machine = observed.machine or MachineObjects()
        kinds: dict[str, tuple[str, tuple[Any, ...]]] = {
            "ChangeNode": ("nodes", observed.nodes),
            "DeleteJob": ("jobs", observed.jobs),
            "MachineConfig": ("machine_configs", machine.configs),
            "MachineConfigPool": ("machine_pools", machine.pools),
            "ContainerRuntimeConfig": ("machine_runtimes", machine.runtime_configs),
            "DaemonSet": ("machine_monitors", machine.monitors),
        }
        about = change.kind if isinstance(change, ApplyObject | DeleteObject) else type(change).__name__
        kind, views = kinds.get(about, ("", ()))
        self._gone |= {(view.uid, kind) for view in views if view.name == getattr(change, "name", "")}


def _indexer(parse: Callable[[Mapping[str, Any]], Any]) -> Callable[..., Any]:
    def index(uid: str, body: Mapping[str, Any], **_: object) -> dict[str, Any]:
        view = parse(body)
        return {} if view is None else {uid: view}

    return index
