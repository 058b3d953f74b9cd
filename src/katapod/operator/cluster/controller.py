"""The loop: kopf watches and keeps what it has seen as views; after every change we decide anew, and carry it out.

Nothing is kept beside those views: what has been done is on the cluster's objects, so whoever starts after us, or
beside us, comes to the same decision. Who does not hold the lease watches, so as to be ready, and decides nothing.
"""

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Callable, Coroutine, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeVar

import kopf
import msgspec

from katapod.model.kataconfig import Status
from katapod.operator.cluster.changes import (
    ApplyClass,
    ApplyObject,
    Change,
    ChangeNode,
    DeleteJob,
    DeleteObject,
    describe,
    name_of,
)
from katapod.operator.cluster.client import ClusterClient
from katapod.operator.cluster.decide import Observed, Plan, by_age, decide, needs_pods
from katapod.operator.cluster.election import Elector
from katapod.operator.cluster.errors import ClusterFailed, EvictionRefused
from katapod.operator.cluster.events import changes_of, event_object, known_phases, node_changes, phases_of
from katapod.operator.cluster.machine_config.views import MACHINE_RESOURCES, MachineObjects, machine_objects
from katapod.operator.cluster.objects import Settings
from katapod.operator.cluster.views import (
    ConfigView,
    UserPod,
    parse_class,
    parse_config,
    parse_job,
    parse_node,
    parse_pod,
)
from katapod.operator.cluster.webhook import Webhook
from katapod.operator.names import GROUP, READY, READY_LABEL
from katapod.tasks import Background

__all__ = ["Controller"]

log = logging.getLogger(__name__)

SETTLE_S = 0.2  # changes come in bursts
PODS_S = 5.0  # pods are looked for so often while something waits for their end
RETRY_S, RETRY_MAX_S = 1.0, 30.0
AGAIN_S = 10.0  # before the same is asked again of an object that has not been seen to change

_Answer = TypeVar("_Answer")

RESOURCES: dict[str, tuple[tuple[str, str, str], Callable[[Mapping[str, Any]], Any]]] = {
    "configs": ((GROUP, "v1", "kataconfigs"), parse_config),
    "nodes": (("", "v1", "nodes"), parse_node),
    "jobs": (("batch", "v1", "jobs"), parse_job),
    "pods": (("", "v1", "pods"), parse_pod),
    "classes": (("node.k8s.io", "v1", "runtimeclasses"), parse_class),
}


class Asked(NamedTuple):
    change: Change
    view: Any  # of the object, as it was then
    until: float  # by the loop's clock


class Controller:
    def __init__(
        self, client: ClusterClient, settings: Settings, identity: str, webhook_port: int | None, *, machine: bool
    ) -> None:
        """`machine`: whether the cluster has a machine-config operator."""
        self._machine = machine
        self._resources = RESOURCES | (MACHINE_RESOURCES if machine else {})
        self._client = client
        self._webhook = None if webhook_port is None else self._make_webhook(webhook_port)
        self._elector = Elector(client, identity, self._begin)
        self._settings = settings
        self._background = Background()
        self._parts: list[asyncio.Task[None]] = []  # each runs for as long as the operator does
        self._changed = asyncio.Event()
        self._seen: dict[str, dict[str, Any]] = {kind: {} for kind in self._resources}  # views, by uid
        self._indices: Mapping[str, Any] = {}
        self._written: dict[str, Status] = {}  # by the KataConfig's uid: what it has, or will be seen to have
        self._gone: set[tuple[str, str]] = set()  # uids and kinds
        self._phases: dict[str, str] | None = None  # of nodes, as events have told of them
        self._refused: dict[str, str] = {}  # pods that could not be evicted
        self._users: tuple[UserPod, ...] | None = None  # as they were listed last
        self._users_until = 0.0  # by the loop's clock: how long that counts
        self._asked: dict[tuple[type, str], Asked] = {}  # what the last pass has asked for
        self.passes = 0  # how often something has been decided

    def register(self, registry: kopf.OperatorRegistry) -> None:
        """An index of each resource: kopf calls no handler until all of them are complete."""
        kopf.on.startup(registry=registry)(self._start)
        kopf.on.cleanup(registry=registry)(self._stop)
        kopf.on.probe(registry=registry, id="passes")(self.probe)
        for kind, (resource, parse) in self._resources.items():
            kopf.index(*resource, registry=registry, id=kind)(_indexer(parse))
            kopf.on.event(*resource, registry=registry, id=f"{kind}-changed")(self._watcher(kind))

    async def _start(self, **_: object) -> None:
        parts: dict[str, Coroutine[Any, Any, None]] = {"reconcile": self._loop(), "election": self._elector.run()}
        if self._webhook is not None:
            parts["webhook"] = self._webhook.run()
        self._parts = [self._background.start(work, name=name) for name, work in parts.items()]

    async def probe(self, **_: object) -> int:
        """What the liveness probe asks: how often something has been decided.

        Raises kopf.PermanentError, an answer with the status 500, when one of our tasks has ended: an unexpected error
        ends it alone, and an operator without it would look as one that has nothing to do.
        """
        if ended := [part.get_name() for part in self._parts if part.done()]:
            raise kopf.PermanentError(f"the task {', '.join(ended)} has ended")
        return self.passes

    async def _stop(self, **_: object) -> None:
        await self._background.close()
        await self._elector.release()
        await self._client.close()

    def _make_webhook(self, port: int) -> Webhook:
        def there() -> tuple[ConfigView, ...]:
            return tuple(self._seen["configs"].values())

        return Webhook(
            self._client,
            port,
            there=there,
            is_complete=lambda: bool(self._indices),
            leads=lambda: self._elector.left_s() > 0,
        )

    def _begin(self) -> None:
        """This operator acts from now on: another one may have written since it last did."""
        self._written.clear()
        self._asked, self._users, self._phases = {}, None, None
        self._changed.set()

    async def _as_holder(self, asked: Coroutine[Any, Any, _Answer]) -> _Answer:
        """What is asked of the API server ends before the lease may be another's. Raises ClusterFailed."""
        left_s = self._elector.left_s()
        try:
            if not left_s:
                asked.close()
                raise TimeoutError
            async with asyncio.timeout(left_s):
                return await asked
        except TimeoutError:
            raise ClusterFailed("cannot go on: the lease has not been renewed in time") from None

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
        return Observed(
            **views,
            users=None,
            now=datetime.now(UTC),
            refused=self._refused,
            machine=machine_objects(machine) if self._machine else None,
        )

    def _drop_old(self) -> None:
        """What is kept beside the indices is of objects that they have."""
        self._gone = {(uid, kind) for uid, kind in self._gone if uid in self._indices[kind]}
        self._written = {uid: status for uid, status in self._written.items() if uid in self._indices["configs"]}

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
        if not self._indices or not self._elector.left_s():
            return None
        self._drop_old()
        observed = self._observe()
        asks = needs_pods(observed, self._settings)
        if asks:
            observed = dataclasses.replace(observed, users=await self._list_users())
        plan = decide(observed, self._settings)
        self.passes += 1
        await self._write_statuses(observed, plan)
        await self._tell_of_nodes(observed, plan)
        waits = [PODS_S] if asks else []
        waits += await self._carry_out(observed, plan)
        if plan.wake is not None:
            waits.append(max((plan.wake - observed.now).total_seconds(), 0))
        return min(waits, default=None)

    async def _list_users(self) -> tuple[UserPod, ...]:
        """Not in every pass: of a large cluster that is much. But always after something was closed to new pods."""
        now = asyncio.get_running_loop().time()
        if self._users is None or now >= self._users_until:
            self._users = await self._as_holder(self._client.sandboxed_pods())
            self._users_until = now + PODS_S
        return self._users

    async def _carry_out(self, observed: Observed, plan: Plan) -> list[float]:
        """Returns when to look again at what has been asked for already: the watch may be behind us."""
        now = asyncio.get_running_loop().time()
        machine = observed.machine or MachineObjects()
        views: dict[tuple[type, str], Any] = {
            (kind, view.name): view
            for kind, found in (
                (ChangeNode, observed.nodes),
                (DeleteJob, observed.jobs),
                (ApplyClass, observed.classes),
                (ApplyObject, machine.views()),
                (DeleteObject, machine.views()),
            )
            for view in found
        }
        before, self._asked, self._refused = self._asked, {}, {}
        waits = []
        for change in plan.changes:
            key = type(change), name_of(change)
            asked = before.get(key)
            view = views.get(key)
            if asked is not None and (asked.change, asked.view) == (change, view) and now < asked.until:
                self._asked[key] = asked
                waits.append(asked.until - now)
                if key[1] in observed.refused:
                    self._refused[key[1]] = observed.refused[key[1]]
                continue
            log.info("%s", describe(change))
            try:
                if not await self._as_holder(self._client.carry_out(change)):
                    self._forget(observed, change)
            except EvictionRefused as exc:
                log.warning("cannot evict a pod: %s", exc)
                self._refused[key[1]] = str(exc)
                self._asked[key] = Asked(change, view, now + PODS_S)
                continue
            self._asked[key] = Asked(change, view, now + AGAIN_S)
            if closes(change, view):
                self._users = None
        if self._refused and self._refused != observed.refused:
            self._changed.set()  # for the status
        return waits

    async def _write_statuses(self, observed: Observed, plan: Plan) -> None:
        for config in observed.configs:
            status = plan.statuses.get(config.name)
            if status is None or status == self._written.get(config.uid, config.status):
                continue
            if await self._as_holder(self._client.write_status(config.name, msgspec.to_builtins(status))):
                before = self._written.get(config.uid, config.status)
                self._written[config.uid] = status
                for told in changes_of(before, status):
                    await self._as_holder(self._client.post_event(event_object(config, told, observed.now)))

    async def _tell_of_nodes(self, observed: Observed, plan: Plan) -> None:
        config = next((one for one in by_age(observed) if one.name in plan.statuses), None)
        if config is None:
            return
        before = known_phases(config.status, plan.nodes) if self._phases is None else self._phases
        self._phases = phases_of(plan.nodes)
        for told in node_changes(before, plan.nodes):
            await self._as_holder(self._client.post_event(event_object(config, told, observed.now)))

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
        self._gone |= {(view.uid, kind) for view in views if view.name == name_of(change)}


def closes(change: Change, view: Any) -> bool:
    """Whether no new pod comes somewhere after it, so that those that are there are all that there will be."""
    if isinstance(change, ChangeNode):
        cordons = bool(change.patch.get("spec", {}).get("unschedulable"))
        return cordons or (
            READY_LABEL in view.labels and change.patch["metadata"]["labels"].get(READY_LABEL, READY) is None
        )
    return isinstance(change, ApplyClass)


def _indexer(parse: Callable[[Mapping[str, Any]], Any]) -> Callable[..., Any]:
    def index(uid: str, body: Mapping[str, Any], **_: object) -> dict[str, Any]:
        view = parse(body)
        return {} if view is None else {uid: view}

    return index
