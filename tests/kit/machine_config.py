"""OpenShift's machine-config operator, simulated: it renders pools, and walks nodes from one configuration to the next.

It speaks to an API server by paths, as kit.control_plane.ControlPlane does, and to MemoryApi in unit tests. The custom
resources have schemas of our own, with the fields that are used. What it does not do is change any node: a test says
which nodes fail, and which stay at work.
"""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from katapod.operator.cluster.machine_config.views import parse_pool
from katapod.operator.cluster.selectors import selects
from kit.control_plane import ApiError, ControlPlane

__all__ = [
    "CONFIGS",
    "POOLS",
    "RUNTIMES",
    "MachineConfigOperator",
    "MemoryApi",
    "add_openshift_node",
    "install_types",
    "openshift_node",
]

Body = dict[str, Any]
GROUP = "machineconfiguration.openshift.io"
API = f"/apis/{GROUP}/v1"
CONFIGS, POOLS, RUNTIMES = f"{API}/machineconfigs", f"{API}/machineconfigpools", f"{API}/containerruntimeconfigs"
NODES, PODS = "/api/v1/nodes", "/api/v1/pods"
RHCOS = "Red Hat Enterprise Linux CoreOS 48.84.202108161759-0 (Ootpa)"
OS_IMAGE = "registry.example/os:4.8"
PERIOD_S = 0.1


class Api(Protocol):
    def items(self, path: str) -> list[Body]: ...
    def ask(self, method: str, path: str, body: Any = None) -> Body: ...
    def merge(self, path: str, patch: Any) -> Body: ...


class MemoryApi:
    """What the machine-config operator needs of an API server, on dictionaries."""

    def __init__(self, nodes: dict[str, Body]) -> None:
        self.kinds: dict[str, dict[str, Body]] = {CONFIGS: {}, POOLS: {}, RUNTIMES: {}, NODES: nodes, PODS: {}}
        self._made = 0

    def items(self, path: str) -> list[Body]:
        return [self.kinds[path][name] for name in sorted(self.kinds[path])]

    def ask(self, method: str, path: str, body: Any = None) -> Body:
        if method == "POST":
            self._made += 1
            name = body["metadata"]["name"]
            assert name not in self.kinds[path], f"there is one already: {name}"
            metadata = {"uid": f"uid-{self._made}", "generation": 1, **body["metadata"]}
            self.kinds[path][name] = {**body, "metadata": metadata}
            return self.kinds[path][name]
        assert method == "DELETE"
        kind, name = path.rsplit("/", 1)
        gone = self.kinds[kind].pop(name)
        for objects in self.kinds.values():  # as the garbage collector does
            for one in list(objects):
                owners = objects[one]["metadata"].get("ownerReferences", ())
                if any(owner["uid"] == gone["metadata"]["uid"] for owner in owners):
                    del objects[one]
        return gone

    def merge(self, path: str, patch: Any) -> Body:
        kind, name = path.removesuffix("/status").rsplit("/", 1)
        merged: Body = _merged(self.kinds[kind][name], patch)
        self.kinds[kind][name] = merged
        return merged


def _merged(value: Any, patch: Any) -> Any:
    """RFC 7396."""
    if not isinstance(patch, dict):
        return patch
    found = dict(value) if isinstance(value, dict) else {}
    for key, one in patch.items():
        if one is None:
            found.pop(key, None)
        else:
            found[key] = _merged(found.get(key), one)
    return found


def install_types(plane: ControlPlane) -> None:
    """The custom resources, served before this returns."""
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    texts = {"type": "array", "items": {"type": "string"}, "nullable": True}
    number, text, flag = {"type": "integer"}, {"type": "string"}, {"type": "boolean"}
    counts = ("machineCount", "updatedMachineCount", "readyMachineCount", "unavailableMachineCount")
    configuration = {"type": "object", "properties": {"name": text, "source": {"type": "array", "items": anything}}}
    pool_status = {
        **dict.fromkeys((*counts, "degradedMachineCount", "observedGeneration"), number),
        "configuration": configuration,
        "conditions": {"type": "array", "items": anything},
    }
    pool_spec = {
        "machineConfigSelector": anything,
        "nodeSelector": anything,
        "maxUnavailable": {"x-kubernetes-int-or-string": True},
        "paused": flag,
        "configuration": configuration,
    }
    specs: dict[tuple[str, str], tuple[Body, Body | None]] = {
        ("MachineConfig", "machineconfigs"): (
            {"config": anything, "extensions": texts, "osImageURL": text, "kernelArguments": texts},
            None,
        ),
        ("MachineConfigPool", "machineconfigpools"): (pool_spec, {"type": "object", "properties": pool_status}),
        ("ContainerRuntimeConfig", "containerruntimeconfigs"): (
            {"machineConfigPoolSelector": anything, "containerRuntimeConfig": anything},
            anything,
        ),
    }
    for (kind, plural), (spec, status) in specs.items():
        properties = {"spec": {"type": "object", "properties": spec}, **({"status": status} if status else {})}
        version: Body = {"name": "v1", "served": True, "storage": True}
        version["schema"] = {"openAPIV3Schema": {"type": "object", "properties": properties}}
        if status:
            version["subresources"] = {"status": {}}
        body = {
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {"name": f"{plural}.{GROUP}"},
            "spec": {
                "group": GROUP,
                "scope": "Cluster",
                "names": {"kind": kind, "listKind": f"{kind}List", "plural": plural, "singular": kind.lower()},
                "versions": [version],
            },
        }
        plane.kubectl("apply", "-f", "-", text=json.dumps(body))
    for plural in (plural for _, plural in specs):
        plane.kubectl("wait", "--for=condition=Established", f"crd/{plural}.{GROUP}", "--timeout=120s")


def openshift_node(name: str, *roles: str, **labels: str) -> Body:
    """A Ready node of OpenShift, as its kubelet registers it."""
    all_labels = {"kubernetes.io/hostname": name, **{f"node-role.kubernetes.io/{role}": "" for role in roles}, **labels}
    return {
        "metadata": {"name": name, "labels": all_labels, "annotations": {}},
        "status": {"conditions": [{"type": "Ready", "status": "True"}], "nodeInfo": {"osImage": RHCOS}},
    }


def add_openshift_node(plane: ControlPlane, name: str, *roles: str, **labels: str) -> None:
    """The same, with room for pods."""
    room = {"cpu": "4", "memory": "8Gi", "pods": "110"}
    body = openshift_node(name, *roles, **labels)
    status = {**body.pop("status"), "capacity": room, "allocatable": room}
    plane.ask("POST", NODES, body)
    plane.merge(f"{NODES}/{name}/status", {"status": status})
    plane.merge(f"{NODES}/{name}", {"spec": {"taints": None}})  # of nodes that have just come


class MachineConfigOperator:
    """`degraded`: nodes that fail, and why; `held`: nodes that stay at work; `refused`: pools that do not render."""

    def __init__(self, api: Api) -> None:
        self.api = api
        self.degraded: dict[str, str] = {}
        self.held: set[str] = set()
        self.refused: dict[str, str] = {}
        self.reboots: list[str] = []  # the node of each change of what nodes have
        self.evicted: list[str] = []  # pods of others than DaemonSets that were driven away
        self.most_at_once = 0
        self._log: list[str] = []  # of what it has written
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, *pools: str) -> None:
        """A cluster that has just been installed: its pools, each with what its nodes have."""
        for name in pools:
            api_labels = {f"pools.operator.{GROUP}/{name}": ""}
            selector = {"matchLabels": {f"{GROUP}/role": name}}
            spec: Body = {"machineConfigSelector": selector, "nodeSelector": {"matchLabels": _role_label(name)}}
            self.api.ask("POST", POOLS, _object("MachineConfigPool", name, api_labels, spec))
            spec = {"config": {"ignition": {"version": "3.2.0"}}, "osImageURL": OS_IMAGE}
            self.api.ask("POST", CONFIGS, _object("MachineConfig", f"00-{name}", {f"{GROUP}/role": name}, spec))
        self.step()

    def __enter__(self) -> "MachineConfigOperator":
        self._stop.clear()
        self._thread = threading.Thread(target=self._work, name="simulated machine-config operator")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        assert self._thread is not None
        self._thread.join()

    def _work(self) -> None:
        while not self._stop.wait(PERIOD_S):
            with contextlib.suppress(OSError, ApiError):  # no API server, or somebody was faster
                self.step()

    def step(self) -> bool:
        """Look at everything once; whether something has changed."""
        before = len(self._log)
        self._generate()
        for pool in self.api.items(POOLS):
            if "deletionTimestamp" not in pool["metadata"]:
                self._render(pool)
        pools = self.api.items(POOLS)
        of_nodes = [(one, _pool_of(one, pools)) for one in self.api.items(NODES)]
        members = {pool["metadata"]["name"]: [one for one, its in of_nodes if its == pool] for pool in pools}
        for pool in pools:
            self._begin_updates(pool, members[pool["metadata"]["name"]])
        for node in self.api.items(NODES):
            self._change(node)
        now = {one["metadata"]["name"]: one for one in self.api.items(NODES)}
        for pool in pools:
            self._tell(pool, [now[one["metadata"]["name"]] for one in members[pool["metadata"]["name"]]])
        return len(self._log) > before

    def _write(self, path: str, patch: Body) -> None:
        self._log.append(path)
        self.api.merge(path, patch)

    def _generate(self) -> None:
        """ContainerRuntimeConfigs become MachineConfigs of the pools that they select."""
        there = {one["metadata"]["name"]: one for one in self.api.items(CONFIGS)}
        wanted = {}
        for runtime in self.api.items(RUNTIMES):
            selector = runtime["spec"]["machineConfigPoolSelector"]["matchLabels"]
            for pool in self.api.items(POOLS):
                if selector.items() <= pool["metadata"].get("labels", {}).items():
                    name = pool["metadata"]["name"]
                    text = json.dumps(runtime["spec"]["containerRuntimeConfig"], sort_keys=True)
                    file = {"path": "/etc/crio/crio.conf.d/01-ctrcfg-logLevel", "contents": {"source": f"data:,{text}"}}
                    spec: Body = {"config": {"ignition": {"version": "3.2.0"}, "storage": {"files": [file]}}}
                    generated = f"99-{name}-generated-containerruntime"
                    wanted[generated] = _object("MachineConfig", generated, {f"{GROUP}/role": name}, spec)
        for name, body in wanted.items():
            if name not in there:
                self._log.append(name)
                self.api.ask("POST", CONFIGS, body)
            elif there[name]["spec"] != body["spec"]:
                self._write(f"{CONFIGS}/{name}", {"spec": body["spec"]})
        for name in there:
            if name.endswith("-generated-containerruntime") and name not in wanted:
                self._log.append(name)
                self.api.ask("DELETE", f"{CONFIGS}/{name}")

    def _render(self, pool: Body) -> None:
        name = pool["metadata"]["name"]
        if name in self.refused:
            return
        selector = parse_pool(pool).config_selector
        parts = [
            one
            for one in self.api.items(CONFIGS)
            if not one["metadata"]["name"].startswith("rendered-")
            and "deletionTimestamp" not in one["metadata"]
            and selector is not None
            and selects(selector, one["metadata"].get("labels", {}))
        ]
        parts.sort(key=lambda one: str(one["metadata"]["name"]))
        spec = {
            "config": {
                "ignition": {"version": "3.2.0"},
                "storage": {"files": [file for one in parts for file in _files(one)]},
            },
            "extensions": sorted({each for one in parts for each in one["spec"].get("extensions") or ()}),
            "osImageURL": [one["spec"]["osImageURL"] for one in parts if one["spec"].get("osImageURL")][-1],
        }
        digest = hashlib.md5(json.dumps(spec, sort_keys=True).encode(), usedforsecurity=False).hexdigest()
        rendered = f"rendered-{name}-{digest}"
        if all(one["metadata"]["name"] != rendered for one in self.api.items(CONFIGS)):
            body = _object("MachineConfig", rendered, {}, spec)
            owner = {"apiVersion": f"{GROUP}/v1", "kind": "MachineConfigPool", "name": name}
            body["metadata"]["ownerReferences"] = [{**owner, "uid": pool["metadata"]["uid"]}]
            self._log.append(rendered)
            self.api.ask("POST", CONFIGS, body)
        source = [{"kind": "MachineConfig", "name": one["metadata"]["name"]} for one in parts]
        configuration = {"name": rendered, "source": source}
        if pool["spec"].get("configuration") != configuration:
            self._write(f"{POOLS}/{name}", {"spec": {"configuration": configuration}})

    def _begin_updates(self, pool: Body, nodes: Iterable[Body]) -> None:
        spec, found = pool["spec"], list(nodes)
        target = spec.get("configuration", {}).get("name")
        if not target:
            return
        for node in found:
            if not _note(node, "currentConfig"):  # it was installed with this
                self._annotate(node, currentConfig=target, desiredConfig=target, state="Done", reason="")
        if spec.get("paused"):
            return
        busy = [one for one in found if _is_busy(one)]
        self.most_at_once = max(self.most_at_once, len(busy))
        room = int(spec.get("maxUnavailable") or 1) - len(busy)
        waiting = [one for one in found if not _is_busy(one) and _note(one, "currentConfig") not in ("", target)]
        for node in waiting[: max(room, 0)]:
            self._annotate(node, desiredConfig=target)
        for node in busy:
            if _note(node, "state") == "Degraded" and _note(node, "desiredConfig") != target:
                self._annotate(node, desiredConfig=target)

    def _change(self, node: Body) -> None:
        """The node's daemon: one step from what it has to what it is to have."""
        name, state = node["metadata"]["name"], _note(node, "state")
        current, desired = _note(node, "currentConfig"), _note(node, "desiredConfig")
        if current == desired:
            if state == "Degraded":
                self._annotate(node, state="Done", reason="")
            return
        if state == "Done":
            self._drain(name)
            self._annotate(node, state="Working")
            return
        configs = {one["metadata"]["name"]: one["spec"] for one in self.api.items(CONFIGS)}
        lost = next((one for one in (current, desired) if one not in configs), "")
        problem = f"missing MachineConfig {lost}" if lost else self.degraded.get(name, "")
        if problem:
            if (state, _note(node, "reason")) != ("Degraded", problem):
                self._annotate(node, state="Degraded", reason=problem)
        elif state == "Degraded":
            self._annotate(node, state="Working", reason="")
        elif name not in self.held:
            if configs[current] != configs[desired]:
                self.reboots.append(name)
            self._annotate(node, currentConfig=desired, state="Done", reason="")

    def _drain(self, node: str) -> None:
        for pod in self.api.items(PODS):
            owners = pod["metadata"].get("ownerReferences", ())
            if pod["spec"].get("nodeName") != node or any(one["kind"] == "DaemonSet" for one in owners):
                continue
            place = f"{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}"
            self.evicted.append(place.replace("/pods/", "/"))
            self.api.ask("DELETE", f"/api/v1/namespaces/{place}", {"gracePeriodSeconds": 0})

    def _annotate(self, node: Body, **notes: str) -> None:
        annotations = {f"{GROUP}/{key}": value for key, value in notes.items()}
        node["metadata"].setdefault("annotations", {}).update(annotations)
        self._write(f"{NODES}/{node['metadata']['name']}", {"metadata": {"annotations": annotations}})

    def _tell(self, pool: Body, nodes: list[Body]) -> None:
        """The pool's status."""
        name, target = pool["metadata"]["name"], pool["spec"].get("configuration", {}).get("name", "")
        updated = [one for one in nodes if not _is_busy(one) and _note(one, "currentConfig") == target]
        failed = [one for one in nodes if _note(one, "state") == "Degraded"]
        done = len(updated) == len(nodes)
        updating = not done and not pool["spec"].get("paused", False)
        reasons = "; ".join(f"Node {one['metadata']['name']} is reporting: {_note(one, 'reason')}" for one in failed)
        refused = self.refused.get(name, "")
        conditions = [
            _condition("Updated", done),
            _condition("Updating", updating),
            _condition("NodeDegraded", bool(failed), reasons),
            _condition("RenderDegraded", bool(refused), refused),
            _condition("Degraded", bool(failed or refused), reasons or refused),
        ]
        status = {
            "observedGeneration": pool["metadata"]["generation"],
            "machineCount": len(nodes),
            "updatedMachineCount": len(updated),
            "readyMachineCount": len(updated),
            "unavailableMachineCount": sum(map(_is_busy, nodes)),
            "degradedMachineCount": len(failed),
            "conditions": conditions,
        }
        if {**pool.get("status", {}), **status} != pool.get("status"):
            self._write(f"{POOLS}/{name}/status", {"status": status})

    def settle(self) -> None:
        """Until nothing changes any more; for tests without a thread."""
        for _ in range(200):
            if not self.step():
                return
        raise AssertionError("the machine-config operator does not come to rest")


def _object(kind: str, name: str, labels: dict[str, str], spec: Body) -> Body:
    return {
        "apiVersion": f"{GROUP}/v1",
        "kind": kind,
        "metadata": {"name": name, "labels": labels},
        "spec": spec,
    }


def _role_label(name: str) -> dict[str, str]:
    return {f"node-role.kubernetes.io/{name}": ""}


def _files(config: Body) -> Iterator[Body]:
    yield from (config["spec"].get("config") or {}).get("storage", {}).get("files", ())


def _note(node: Body, key: str) -> str:
    return str(node["metadata"].get("annotations", {}).get(f"{GROUP}/{key}", ""))


def _is_busy(node: Body) -> bool:
    return _note(node, "state") != "Done" or _note(node, "currentConfig") != _note(node, "desiredConfig")


def _pool_of(node: Body, pools: list[Body]) -> Body | None:
    """Masters are in no other pool; others in their custom one, if it is one, else among the workers."""
    found = {}
    for pool in pools:
        selector = parse_pool(pool).node_selector
        if selector is not None and selects(selector, node["metadata"].get("labels", {})):
            found[pool["metadata"]["name"]] = pool
    custom = [name for name in found if name not in ("master", "worker")]
    if "master" in found:
        return found["master"]
    if len(custom) > 1:
        return None
    return found.get(custom[0] if custom else "worker")


def _condition(kind: str, holds: bool, message: str = "") -> Body:
    return {"type": kind, "status": "True" if holds else "False", "reason": "", "message": message if holds else ""}
