"""A cluster of OpenShift as values, with the machine-config operator of tests/kit."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cluster_helper import SETTINGS, FakeCluster
from msgspec import structs

from katapod.operator.cluster.changes import ApplyObject, Change, ChangeNode, DeleteObject
from katapod.operator.cluster.decide import Observed, Plan, decide, needs_pods
from katapod.operator.cluster.machine_config.names import POOL_ROLE
from katapod.operator.cluster.machine_config.views import MACHINE_RESOURCES, machine_objects
from katapod.operator.cluster.objects import Settings
from katapod.operator.cluster.views import parse_user_pod
from kit.machine_config import CONFIGS, POOLS, RUNTIMES, MachineConfigOperator, MemoryApi, openshift_node

MONITORS = "/apis/apps/v1/namespaces/katapod/daemonsets"
PATHS = {
    "MachineConfig": CONFIGS,
    "MachineConfigPool": POOLS,
    "ContainerRuntimeConfig": RUNTIMES,
    "DaemonSet": MONITORS,
}
POOL_SETTINGS = structs.replace(SETTINGS, monitor_image="katapod.io/operator:1")


@dataclass
class PoolCluster(FakeCluster):
    settings: Settings = POOL_SETTINGS
    written: list[str] = field(default_factory=list)  # kind and name of what was applied or deleted

    def __post_init__(self) -> None:
        self.api = MemoryApi(self.nodes)
        self.api.kinds[MONITORS] = {}
        self.mco = MachineConfigOperator(self.api)

    def begin(self, workers: str = "abc", masters: str = "m") -> None:
        for name in masters:
            self.nodes[name] = openshift_node(name, "master")
        for name in workers:
            self.nodes[name] = openshift_node(name, "worker")
        for name, node in self.nodes.items():
            node["metadata"]["uid"] = f"uid-{name}"
        self.mco.begin("master", "worker")

    def observed(self) -> Observed:
        found = super().observed()
        views = {
            kind: tuple(view for body in self.api.items(path) if (view := parse(body)) is not None)
            for (kind, (_, parse)), path in zip(MACHINE_RESOURCES.items(), PATHS.values(), strict=True)
        }
        found = dataclasses.replace(found, machine=machine_objects(views), users=None)
        users = tuple(user for body in self.users if (user := parse_user_pod(body)))
        return dataclasses.replace(found, users=users if needs_pods(found, self.settings) else None)

    def step(self) -> Plan:
        plan = decide(self.observed(), self.settings)
        self.take(plan)
        return plan

    def until(self, holds: Callable[[], bool]) -> None:
        """Both operators, one step of each after the other."""
        for _ in range(300):
            if holds():
                return
            self.step()
            self.mco.step()
        raise AssertionError("it does not come to that")

    def rest(self) -> None:
        """Both operators, until neither has anything to do."""
        for _ in range(300):
            if not self.step().changes and not self.mco.step():
                self.step()
                return
        raise AssertionError("it does not come to rest")

    def delete(self) -> None:
        super().delete()
        if self.config is not None and not self.config["metadata"].get("finalizers"):
            self.config = None  # as the API server does

    def labels(self, name: str) -> dict[str, str]:
        found: dict[str, str] = self.nodes[name]["metadata"]["labels"]
        return found

    def nodes_of(self, kind: str) -> list[str]:
        assert self.config is not None
        found: list[str] = list(self.config["status"]["kataNodes"][kind])
        return found

    def _take(self, change: Change) -> None:
        match change:
            case ApplyObject(kind, name, body, new):
                self.written.append(f"{'create' if new else 'change'} {kind} {name}")
                if new:
                    self.api.ask("POST", PATHS[kind], body)
                else:
                    self.api.merge(f"{PATHS[kind]}/{name}", body)
            case DeleteObject(kind, name):
                self.written.append(f"delete {kind} {name}")
                self.api.ask("DELETE", f"{PATHS[kind]}/{name}")
            case ChangeNode(name, patch) if POOL_ROLE in patch["metadata"]["labels"]:
                super()._take(change)
                self.written.append(f"{name} {'joins' if patch['metadata']['labels'][POOL_ROLE] == '' else 'leaves'}")
            case _:
                super()._take(change)
                self.written.append(f"{type(change).__name__} {getattr(change, 'name', '')}".strip())


def objects(cluster: PoolCluster) -> list[str]:
    """What only the operator makes."""
    return [
        str(body["metadata"]["name"])
        for path in PATHS.values()
        for body in cluster.api.items(path)
        if body["metadata"].get("labels", {}).get("app.kubernetes.io/managed-by") == "katapod-operator"
    ]


def notes(node: dict[str, Any], key: str) -> str:
    return str(node["metadata"]["annotations"].get(f"machineconfiguration.openshift.io/{key}", ""))
