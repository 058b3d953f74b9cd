"""The operator on OpenShift: a real API server, controllers and scheduler, its own account, and a simulated
machine-config operator (kit.machine_config) on nodes that are objects only.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kit.control_plane import BIN, ApiError, ControlPlane, needs_control_plane
from kit.kata import wait_for
from kit.machine_config import CONFIGS, POOLS, RUNTIMES, MachineConfigOperator, add_openshift_node, install_types
from kit.operator_cluster import CLASSES, LIMIT_S, Cluster, operating, operator_plane, start_operator
from kit.operator_cluster import CONFIGS as KATACONFIGS

pytestmark = [needs_control_plane, pytest.mark.timeout(900)]

MONITORS = "/apis/apps/v1/namespaces/katapod/daemonsets"
PODS = "/api/v1/namespaces/default/pods"
EXTENSION = "50-enable-sandboxed-containers-extension"
ROLE = "machineconfiguration.openshift.io/role"
KATA_OC = "node-role.kubernetes.io/kata-oc"
SELECTOR: dict[str, Any] = {"kataConfigPoolSelector": {"matchLabels": {"vm": "yes"}}}
WORKERS = ("worker-0", "worker-1", "worker-2")


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    with operator_plane(tmp_path_factory.mktemp("plane")) as found:
        install_types(found)
        yield found


class OpenShift(Cluster):
    """The control plane with a master, three workers and a machine-config operator, for one test."""

    def __init__(self, plane: ControlPlane) -> None:
        super().__init__(plane)
        self.mco = MachineConfigOperator(plane)

    def add_node(self, name: str, role: str, **labels: str) -> None:
        add_openshift_node(self.plane, name, role, **labels)

    def label(self, name: str, **labels: str | None) -> None:
        self.plane.merge(f"/api/v1/nodes/{name}", {"metadata": {"labels": labels}})

    def labels(self, name: str) -> dict[str, str]:
        found: dict[str, str] = self.plane.ask("GET", f"/api/v1/nodes/{name}")["metadata"]["labels"]
        return found

    def lists(self, *kinds: str) -> list[list[str]]:
        nodes = self.status().get("kataNodes", {})
        return [nodes.get(kind, []) for kind in kinds]

    def wait(self, holds: Callable[[], Any], what: str) -> Any:
        return wait_for(holds, f"{what}: {self.plane.directory}/operator.log", LIMIT_S)

    def names(self, path: str) -> set[str]:
        return {one["metadata"]["name"] for one in self.plane.items(path)}

    def left(self) -> list[str]:
        """What only the operator makes, and its words on nodes."""
        found = []
        for path in (CONFIGS, POOLS, RUNTIMES, CLASSES, MONITORS):
            for one in self.plane.items(path):
                if one["metadata"].get("labels", {}).get("app.kubernetes.io/managed-by") == "katapod-operator":
                    found.append(one["metadata"]["name"])
        for node in self.plane.items("/api/v1/nodes"):
            words = {**node["metadata"]["labels"], **node["metadata"].get("annotations", {})}
            found += [f"{node['metadata']['name']} {key}" for key in words if "katapod.io" in key or key == KATA_OC]
        return found

    def run_pod(self, name: str) -> str:
        """A pod in a sandbox, as its kubelet would tell; returns its node."""
        container = {"name": "c", "image": "busybox", "command": ["sleep", "infinity"]}
        spec = {"runtimeClassName": "kata", "containers": [container], "automountServiceAccountToken": False}
        self.plane.ask("POST", PODS, {"metadata": {"name": name}, "spec": spec})
        found = self.wait(lambda: self.plane.ask("GET", f"{PODS}/{name}")["spec"].get("nodeName"), "it has a node")
        self.plane.merge(f"{PODS}/{name}/status", {"status": {"phase": "Running"}})
        return str(found)

    def end_pod(self, name: str) -> None:
        self.plane.ask("DELETE", f"{PODS}/{name}", {"gracePeriodSeconds": 0})


@pytest.fixture
def openshift(plane: ControlPlane) -> Iterator[OpenShift]:
    found = OpenShift(plane)
    found.add_node("master-0", "master")
    for name in WORKERS:
        found.add_node(name, "worker")
    found.mco.begin("master", "worker")
    with found.mco:
        try:
            yield found
        finally:
            for one in plane.items(KATACONFIGS):
                path = f"{KATACONFIGS}/{one['metadata']['name']}"
                plane.merge(path, {"metadata": {"finalizers": None}})
                with contextlib.suppress(ApiError):
                    plane.ask("DELETE", path)
    plane.ask("DELETE", PODS, {"gracePeriodSeconds": 0})
    for path in (CLASSES, MONITORS, RUNTIMES, POOLS, CONFIGS, "/api/v1/nodes"):
        plane.ask("DELETE", path)
        wait_for(lambda path=path: not plane.items(path), f"{path} is empty", LIMIT_S)


def test_all_workers_as_in_the_walkthrough_and_back(openshift: OpenShift) -> None:
    plane = openshift.plane
    with operating(plane):
        openshift.mco.held = {"worker-0"}
        openshift.apply()
        openshift.wait(lambda: openshift.lists("installing") == [["worker-0"]], "the first node is at work")
        assert openshift.lists("installed", "waitingToInstall") == [[], ["worker-1", "worker-2"]]
        assert openshift.condition("InProgress")["reason"] == "Installing"
        assert openshift.names(CLASSES) == set(), "no RuntimeClass before a node is done"
        openshift.mco.held = set()
        openshift.wait_condition("Ready", "True")

        config = plane.ask("GET", f"{CONFIGS}/{EXTENSION}")
        assert config["spec"]["extensions"] == ["sandboxed-containers"]
        assert config["spec"]["config"] == {"ignition": {"version": "3.2.0"}}
        assert config["metadata"]["labels"] == {
            ROLE: "worker",
            "app": "kata",
            "app.kubernetes.io/managed-by": "katapod-operator",
        }
        assert openshift.names(POOLS) == {"master", "worker"}
        found = plane.ask("GET", f"{CLASSES}/kata")
        assert found["handler"] == "kata"
        assert found["overhead"] == {"podFixed": {"cpu": "250m", "memory": "350Mi"}}
        assert found["scheduling"]["nodeSelector"]["node-role.kubernetes.io/worker"] == ""
        assert openshift.lists("installed") == [list(WORKERS)]
        status = openshift.status()
        assert (status["backend"], status["waitingForMcoToStart"]) == ("MachineConfig", False)
        assert openshift.condition("InProgress")["status"] == "False"
        assert openshift.mco.reboots == list(WORKERS)
        assert openshift.mco.most_at_once == 1

        monitor = plane.ask("GET", f"{MONITORS}/openshift-sandboxed-containers-monitor")
        [container] = monitor["spec"]["template"]["spec"]["containers"]
        assert container["image"].startswith("katapod.io/operator:")
        said = subprocess.run(
            [Path(sys.executable).parent / "kata-runtime", "cluster", "status"],
            env={**os.environ, "KUBECONFIG": str(plane.admin), "PATH": f"{BIN}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert "Back end: MachineConfig" in said
        assert "worker-1" in said

        openshift.remove()
        openshift.wait(openshift.is_gone, "the KataConfig has gone")
    assert openshift.left() == []
    assert openshift.names(CLASSES) == set()
    assert openshift.mco.reboots == [*WORKERS, *WORKERS]


def test_a_selector_makes_a_pool_and_a_running_pod_holds_it(openshift: OpenShift) -> None:
    plane = openshift.plane
    openshift.label("worker-1", vm="yes")
    with operating(plane):
        openshift.apply(**SELECTOR)
        openshift.wait_condition("Ready", "True")
        pool = plane.ask("GET", f"{POOLS}/kata-oc")
        assert pool["spec"]["machineConfigSelector"]["matchExpressions"] == [
            {"key": ROLE, "operator": "In", "values": ["kata-oc", "worker"]}
        ]
        assert pool["spec"]["nodeSelector"] == {"matchLabels": {KATA_OC: ""}}
        assert plane.ask("GET", f"{CONFIGS}/{EXTENSION}")["metadata"]["labels"][ROLE] == "kata-oc"
        assert [name for name in WORKERS if KATA_OC in openshift.labels(name)] == ["worker-1"]
        assert openshift.lists("installed") == [["worker-1"]]
        assert openshift.mco.reboots == ["worker-1"]

        assert openshift.run_pod("one") == "worker-1"
        openshift.remove()
        blocked = openshift.wait_condition("Blocked", "True")
        assert blocked["message"] == "deletion waits for 1 pods: default/one"
        assert openshift.condition("InProgress")["reason"] == "BlockedByExistingKataPods"
        assert EXTENSION in openshift.names(CONFIGS)
        assert "kata-oc" in openshift.names(POOLS)
        openshift.end_pod("one")
        openshift.wait(openshift.is_gone, "the KataConfig has gone")
    assert openshift.left() == []
    assert "kata-oc" not in openshift.names(POOLS)
    assert openshift.mco.reboots == ["worker-1", "worker-1"]
    assert openshift.mco.evicted == []


def test_a_degraded_node_is_named_and_recovers(openshift: OpenShift) -> None:
    openshift.mco.degraded = {"worker-1": "rpm-ostree: no space left on device"}
    with operating(openshift.plane):
        openshift.apply()
        told = openshift.wait_condition("Degraded", "True", "NodesFailed")
        assert told["message"] == "worker-1: rpm-ostree: no space left on device"
        assert openshift.lists("failedToInstall", "waitingToInstall") == [["worker-1"], ["worker-2"]]
        failed = openshift.condition("InProgress")
        assert (failed["status"], failed["reason"]) == ("True", "Failed")
        assert "worker-1" in failed["message"]
        openshift.wait(lambda: "kata" in openshift.names(CLASSES), "the node that is done can be used")
        openshift.mco.degraded = {}
        openshift.wait_condition("Ready", "True")
        assert openshift.condition("Degraded")["status"] == "False"
        assert openshift.lists("failedToInstall", "installed") == [[], list(WORKERS)]


def test_nodes_follow_the_selector(openshift: OpenShift) -> None:
    openshift.label("worker-0", vm="yes")
    with operating(openshift.plane):
        openshift.apply(**SELECTOR)
        openshift.wait_condition("Ready", "True")
        openshift.mco.held = {"worker-1"}
        openshift.label("worker-1", vm="yes")
        openshift.wait_condition("InProgress", "True", "Updating")
        openshift.label("worker-0", vm=None)
        openshift.wait(lambda: KATA_OC not in openshift.labels("worker-0"), "it leaves the pool")
        openshift.mco.held = set()
        openshift.wait(lambda: [one["name"] for one in openshift.status()["nodes"]] == ["worker-1"], "it has left")
        openshift.wait_condition("Ready", "True")
        assert openshift.lists("installed") == [["worker-1"]]
        assert sorted(openshift.mco.reboots) == ["worker-0", "worker-0", "worker-1"]
        openshift.add_node("worker-3", "worker", vm="yes")
        openshift.wait(lambda: openshift.lists("installed") == [["worker-1", "worker-3"]], "a new node has it")


def test_from_some_workers_to_all(openshift: OpenShift) -> None:
    openshift.label("worker-0", vm="yes")
    with operating(openshift.plane):
        openshift.apply(**SELECTOR)
        openshift.wait_condition("Ready", "True")
        openshift.apply()
        openshift.wait(lambda: openshift.lists("installed") == [list(WORKERS)], "all have it")
        openshift.wait(lambda: "kata-oc" not in openshift.names(POOLS), "the pool has gone")
        assert openshift.mco.reboots == ["worker-0", "worker-1", "worker-2"], "one each, and none for the move"
        assert KATA_OC not in openshift.labels("worker-0")


def test_an_upgrade_rolls_the_nodes(openshift: OpenShift, monkeypatch: pytest.MonkeyPatch) -> None:
    plane = openshift.plane
    monkeypatch.setenv("KATAPOD_OS_IMAGE", "registry.example/katapod:1")
    with operating(plane):
        openshift.apply()
        openshift.wait_condition("Ready", "True")
        assert openshift.names(CONFIGS) & {EXTENSION} == set()
    openshift.mco.reboots.clear()
    openshift.mco.held = {"worker-0"}
    monkeypatch.setenv("KATAPOD_OS_IMAGE", "registry.example/katapod:2")
    with operating(plane):
        openshift.wait(lambda: openshift.lists("installing") == [["worker-0"]], "it rolls")
        assert openshift.condition("InProgress")["reason"] == "Updating"
        assert openshift.run_pod("meanwhile") in WORKERS, "nodes are usable until it is their turn"
        openshift.end_pod("meanwhile")
        openshift.mco.held = set()
        wanted = {"registry.example/katapod:2"}
        openshift.wait(lambda: {one["target"] for one in openshift.status()["nodes"]} == wanted, "all have the new one")
    assert openshift.mco.reboots == list(WORKERS)
    assert openshift.mco.most_at_once == 1


def test_the_log_level_comes_and_goes(openshift: OpenShift) -> None:
    with operating(openshift.plane):
        openshift.apply(logLevel="debug")
        openshift.wait_condition("Ready", "True")
        spec = openshift.plane.ask("GET", f"{RUNTIMES}/kata-crio-config")["spec"]
        assert spec["containerRuntimeConfig"] == {"logLevel": "debug"}
        selected = spec["machineConfigPoolSelector"]["matchLabels"]
        assert selected == {"pools.operator.machineconfiguration.openshift.io/worker": ""}
        generated = "99-worker-generated-containerruntime"
        openshift.wait(lambda: generated in openshift.names(CONFIGS), "the pool has it")
        openshift.apply()
        openshift.wait(lambda: generated not in openshift.names(CONFIGS), "the pool has it no more")
        assert openshift.names(RUNTIMES) == set()
        openshift.wait_condition("Ready", "True")


def test_a_paused_pool_is_told_as_the_reason(openshift: OpenShift) -> None:
    plane = openshift.plane
    plane.merge(f"{POOLS}/worker", {"spec": {"paused": True}})
    with operating(plane):
        openshift.apply()
        told = openshift.wait_condition("Progressing", "False", "Paused")
        assert told["message"] == f"MachineConfigPool worker: spec.paused; waiting: {', '.join(WORKERS)}"
        assert openshift.status()["summary"].startswith("paused: MachineConfigPool worker")
        assert openshift.mco.reboots == []
        plane.merge(f"{POOLS}/worker", {"spec": {"paused": False}})
        openshift.wait_condition("Ready", "True")


def test_a_second_one_is_refused(openshift: OpenShift) -> None:
    with operating(openshift.plane):
        openshift.apply()
        openshift.wait_condition("Ready", "True")
        time.sleep(1.1)  # ages are in whole seconds
        openshift.apply("second", **SELECTOR)
        told = openshift.wait_condition("Degraded", "True", "Invalid", name="second")
        assert told["message"] == "there is one already: kata"
        assert openshift.condition("Ready")["status"] == "True"
        assert openshift.names(POOLS) == {"master", "worker"}


def test_it_goes_on_where_another_was_killed(openshift: OpenShift) -> None:
    """After another number of writes each time: nothing is kept but what is on the cluster."""
    plane = openshift.plane
    openshift.label("worker-1", vm="yes")

    def writes() -> int:
        asked = plane.operator_requests()
        return sum(verb in ("create", "patch", "delete") and "/leases" not in path for verb, path in asked)

    def is_killed_after(number: int) -> None:
        enough = writes() + number
        process = start_operator(plane, "one")
        try:
            wait_for(lambda: writes() >= enough, f"it has written: {plane.directory}/operator.log", LIMIT_S)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()

    openshift.apply(**SELECTOR, logLevel="warn")
    for number in (1, 2, 3, 2):
        is_killed_after(number)
    with operating(plane, "one"):
        openshift.wait_condition("Ready", "True")
    openshift.remove()
    for number in (1, 2, 3):
        is_killed_after(number)
    with operating(plane, "one"):
        openshift.wait(openshift.is_gone, "the KataConfig has gone")
    assert openshift.left() == []
    assert "kata-oc" not in openshift.names(POOLS)
    assert set(openshift.mco.reboots) == {"worker-1"}


@pytest.mark.parametrize(
    "what",
    [
        "delete machineconfigs/00-worker",
        "patch machineconfigpools/worker",
        "get machineconfigs/00-worker",
        "delete daemonsets/other -n katapod",
        "create daemonsets -n default",
    ],
)
def test_what_the_operator_may_not(plane: ControlPlane, what: str) -> None:
    words = ["auth", "can-i", *what.split(), "--as=system:serviceaccount:katapod:katapod-operator"]
    assert plane.kubectl(*words, check=False).stdout.strip() == "no"
