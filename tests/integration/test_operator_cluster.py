"""The operator against a real API server, controllers and scheduler, with the rights of its own account.

There is no kubelet: what node jobs come to is said by kit.control_plane.SimulatedKubelet.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kit.control_plane import (
    ApiError,
    ControlPlane,
    SimulatedKubelet,
    control_plane_running,
    needs_control_plane,
)
from kit.kata import wait_for

pytestmark = [needs_control_plane, pytest.mark.timeout(900)]

TOP = Path(__file__).resolve().parents[2]
CONFIGS = "/apis/kataconfiguration.openshift.io/v1/kataconfigs"
CLASSES = "/apis/node.k8s.io/v1/runtimeclasses"
NODES = ("node-a", "node-b", "node-c")
LIMIT_S = 180.0


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    with control_plane_running(tmp_path_factory.mktemp("plane")) as found:
        found.kubectl("apply", "-k", str(TOP / "packaging/operator"))
        condition = "--for=condition=Established"
        found.kubectl("wait", condition, "crd/kataconfigs.kataconfiguration.openshift.io", "--timeout=120s")
        yield found


class Cluster:
    """The control plane with three nodes, for one test."""

    def __init__(self, plane: ControlPlane) -> None:
        self.plane = plane
        self.outcomes: dict[str, bool | None] = {}  # by node: whether installing succeeds; None: it runs on
        self.kubelet = SimulatedKubelet(plane, self._outcome)

    def _outcome(self, action: str, node: str) -> tuple[str, bool] | None:
        good = self.outcomes.get(node, True)
        if good is None:
            return None
        if action == "uninstall":
            return json.dumps({"action": action, "ok": True, "stage": "done"}), True
        report = {"action": action, "ok": good, "target": "0.1.0", "stage": "done" if good else "proof"}
        report |= (
            {"accelerator": "uml", "kernel": "6.1.0", "proofS": 1.25} if good else {"message": "no sandbox starts"}
        )
        return json.dumps(report), good

    def apply(self, name: str = "kata", **spec: Any) -> None:
        body = {"apiVersion": "kataconfiguration.openshift.io/v1", "kind": "KataConfig", "metadata": {"name": name}}
        self.plane.kubectl("apply", "-f", "-", text=json.dumps({**body, "spec": spec}))

    def status(self, name: str = "kata") -> dict[str, Any]:
        found: dict[str, Any] = self.plane.ask("GET", f"{CONFIGS}/{name}").get("status", {})
        return found

    def condition(self, kind: str, name: str = "kata") -> dict[str, Any]:
        return next((one for one in self.status(name).get("conditions", ()) if one["type"] == kind), {})

    def wait_condition(self, kind: str, status: str, reason: str = "", name: str = "kata") -> dict[str, Any]:
        def holds() -> dict[str, Any] | None:
            with contextlib.suppress(OSError):
                found = self.condition(kind, name)
                return found if found.get("status") == status and found["reason"].startswith(reason) else None
            return None

        found: dict[str, Any] = wait_for(holds, f"{kind} is {status} {reason}", LIMIT_S)
        return found

    def is_gone(self, name: str = "kata") -> bool:
        with contextlib.suppress(OSError):
            return all(one["metadata"]["name"] != name for one in self.plane.items(CONFIGS))
        return False

    def remove(self, name: str = "kata") -> None:
        self.plane.ask("DELETE", f"{CONFIGS}/{name}")

    def nodes(self) -> dict[str, tuple[Any, Any]]:
        """Labels and annotations of each."""
        found = [one["metadata"] for one in self.plane.items("/api/v1/nodes")]
        return {one["name"]: (one.get("labels"), one.get("annotations")) for one in found}

    def left(self) -> list[str]:
        """Objects that only the operator makes."""
        jobs = [one["metadata"]["name"] for one in self.plane.items("/apis/batch/v1/namespaces/katapod/jobs")]
        return jobs + [one["metadata"]["name"] for one in self.plane.items(CLASSES)]


@pytest.fixture
def cluster(plane: ControlPlane) -> Iterator[Cluster]:
    for name in NODES:
        plane.add_node(name)
    found = Cluster(plane)
    with found.kubelet:
        try:
            yield found
        finally:
            found.outcomes = dict.fromkeys(NODES, True)
            forced = {"metadata": {"annotations": {"katapod.io/force-delete": "true"}, "finalizers": None}}
            for one in plane.items(CONFIGS):
                plane.merge(f"{CONFIGS}/{one['metadata']['name']}", forced)
                with contextlib.suppress(ApiError):
                    plane.ask("DELETE", f"{CONFIGS}/{one['metadata']['name']}")
            for path in ("/api/v1/nodes", CLASSES, "/apis/batch/v1/namespaces/katapod/jobs"):
                plane.ask("DELETE", path, {"propagationPolicy": "Background"})
            wait_for(lambda: not plane.items("/api/v1/namespaces/katapod/pods"), "pods of jobs have gone", LIMIT_S)


def start_operator(plane: ControlPlane) -> "subprocess.Popen[bytes]":
    with (plane.directory / "operator.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "katapod.operator.cluster.main"],
            env={**os.environ, "KUBECONFIG": str(plane.operator)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


@contextlib.contextmanager
def operating(plane: ControlPlane) -> Iterator["subprocess.Popen[bytes]"]:
    process = start_operator(plane)
    try:
        yield process
        assert process.poll() is None, "the operator has ended by itself"
    finally:
        process.terminate()
        process.wait(60)


def sandboxed_pod(name: str, **spec: Any) -> dict[str, Any]:
    container = {"name": "c", "image": "busybox", "command": ["sleep", "infinity"]}
    wanted = {"runtimeClassName": "kata", "containers": [container], "automountServiceAccountToken": False, **spec}
    return {"metadata": {"name": name}, "spec": wanted}


def test_from_one_kataconfig_to_a_class_and_back(cluster: Cluster) -> None:
    plane, before = cluster.plane, cluster.nodes()
    with operating(plane):
        cluster.apply()
        cluster.wait_condition("Ready", "True")
        status = cluster.status()
        assert status["summary"] == "3 of 3 nodes are ready"
        assert status["kataNodes"]["installed"] == list(NODES)
        assert status["nodes"][0]["accelerator"] == "uml"
        assert status["nodes"][0]["proofSeconds"] == 1.25
        table = plane.kubectl("get", "kataconfig").stdout.splitlines()
        assert table[0].split() == ["NAME", "INPROGRESS", "COMPLETED", "TOTAL", "AGE", "SUMMARY"]
        assert table[1].endswith("3 of 3 nodes are ready")
        wait_for(lambda: "NodeReady" in plane.kubectl("get", "events").stdout, "an event says so", LIMIT_S)

        found = plane.ask("GET", f"{CLASSES}/kata")
        assert found["handler"] == "kata"
        assert found["overhead"] == {"podFixed": {"cpu": "250m", "memory": "350Mi"}}
        # a pod gets them from the API server, and its node from the scheduler
        plane.ask("POST", "/api/v1/namespaces/default/pods", sandboxed_pod("one"))
        pod = "/api/v1/namespaces/default/pods/one"
        wait_for(lambda: plane.ask("GET", pod)["spec"].get("nodeName"), "the pod has a node", LIMIT_S)
        spec = plane.ask("GET", pod)["spec"]
        assert spec["overhead"] == {"cpu": "250m", "memory": "350Mi"}
        assert spec["nodeSelector"] == {"katapod.io/runtime": "ready"}
        plane.merge(f"{pod}/status", {"status": {"phase": "Running"}})

        cluster.remove()
        blocked = cluster.wait_condition("Blocked", "True")
        assert blocked["message"] == "deletion waits for 1 pods: default/one"
        assert cluster.condition("InProgress")["reason"] == "BlockedByExistingKataPods"
        events = plane.kubectl("get", "events").stdout
        assert "default/one" in events
        # no new pod finds a node meanwhile
        plane.ask("POST", "/api/v1/namespaces/default/pods", sandboxed_pod("two"))
        two = "/api/v1/namespaces/default/pods/two"
        wait_for(lambda: plane.ask("GET", two)["status"].get("conditions"), "the scheduler has looked", LIMIT_S)
        assert "nodeName" not in plane.ask("GET", two)["spec"]
        assert plane.ask("GET", pod)["status"]["phase"] == "Running"
        assert not any(action == "uninstall" for action, _ in cluster.kubelet.ran)

        for path in (pod, two):
            plane.ask("DELETE", path, {"gracePeriodSeconds": 0})
        wait_for(cluster.is_gone, "the KataConfig has gone", LIMIT_S)
    assert cluster.nodes() == before
    assert cluster.left() == []
    assert sorted(cluster.kubelet.ran) == sorted((action, n) for action in ("install", "uninstall") for n in NODES)


def test_a_failed_canary_stops_the_rest(cluster: Cluster) -> None:
    cluster.outcomes["node-a"] = False
    with operating(cluster.plane):
        cluster.apply(rollout={"maxUnavailable": 3})
        told = cluster.wait_condition("Degraded", "True", "NodesFailed")
        assert told["message"] == "node-a: stage proof: no sandbox starts"
        cluster.wait_condition("Progressing", "False", "Stopped")
        assert cluster.status()["kataNodes"]["waitingToInstall"] == ["node-b", "node-c"]
        assert cluster.plane.items(CLASSES) == []
        assert cluster.kubelet.ran == [("install", "node-a")]


def test_nodes_follow_their_labels(cluster: Cluster) -> None:
    plane = cluster.plane
    plane.merge("/api/v1/nodes/node-a", {"metadata": {"labels": {"pool": "vm"}}})
    with operating(plane):
        cluster.apply(kataConfigPoolSelector={"matchLabels": {"pool": "vm"}})
        cluster.wait_condition("Ready", "True")
        assert cluster.status()["kataNodes"]["installed"] == ["node-a"]
        plane.merge("/api/v1/nodes/node-b", {"metadata": {"labels": {"pool": "vm"}}})
        plane.merge("/api/v1/nodes/node-a", {"metadata": {"labels": {"pool": None}}})
        wait_for(lambda: cluster.status()["kataNodes"]["installed"] == ["node-b"], "b has it, a has not", LIMIT_S)
        wait_for(lambda: [one["name"] for one in cluster.status()["nodes"]] == ["node-b"], "a is clean", LIMIT_S)
        plane.add_node("node-d", pool="vm")
        wait_for(
            lambda: cluster.status()["kataNodes"]["installed"] == ["node-b", "node-d"], "a new node has it", LIMIT_S
        )
        assert cluster.nodes()["node-a"][1] in (None, {})


def test_only_the_oldest_counts(cluster: Cluster) -> None:
    with operating(cluster.plane):
        cluster.apply()
        cluster.wait_condition("Ready", "True")
        time.sleep(1.1)  # ages are in whole seconds
        cluster.apply("second")
        told = cluster.wait_condition("Degraded", "True", "Invalid", name="second")
        assert told["message"] == "there is one already: kata"
        cluster.remove("second")
        wait_for(lambda: cluster.is_gone("second"), "it goes at once", LIMIT_S)
        assert cluster.condition("Ready")["status"] == "True"


def test_killed_again_and_again_it_ends_in_the_right_state(cluster: Cluster) -> None:
    """At another moment each time; and at the end two of them at once."""
    plane, before, stop = cluster.plane, cluster.nodes(), threading.Event()

    def kill_and_start() -> None:
        pause_s = 1.0
        while not stop.is_set():
            process = start_operator(plane)
            stop.wait(pause_s)
            process.send_signal(signal.SIGKILL)
            process.wait()
            pause_s = pause_s + 0.7 if pause_s < 8 else 2.0

    killer = threading.Thread(target=kill_and_start)
    killer.start()
    try:
        cluster.apply(rollout={"maxUnavailable": 2})
        cluster.wait_condition("Ready", "True")
        cluster.remove()
        wait_for(cluster.is_gone, "the KataConfig has gone", LIMIT_S)
    finally:
        stop.set()
        killer.join()
    assert cluster.nodes() == before
    assert cluster.left() == []
    assert sorted(cluster.kubelet.ran) == sorted((action, n) for action in ("install", "uninstall") for n in NODES)


def test_two_at_once_do_everything_once(cluster: Cluster) -> None:
    before = cluster.nodes()
    with operating(cluster.plane), operating(cluster.plane):
        cluster.apply()
        cluster.wait_condition("Ready", "True")
        cluster.remove()
        wait_for(cluster.is_gone, "the KataConfig has gone", LIMIT_S)
    assert cluster.nodes() == before
    assert cluster.left() == []
    assert sorted(cluster.kubelet.ran) == sorted((action, n) for action in ("install", "uninstall") for n in NODES)


def test_the_api_server_goes_and_comes_again(cluster: Cluster) -> None:
    plane, before = cluster.plane, cluster.nodes()
    with operating(plane):
        cluster.outcomes["node-a"] = None
        cluster.apply()
        wait_for(lambda: cluster.kubelet.ran, "the first job is at work", LIMIT_S)
        plane.stop_api()
        cluster.outcomes["node-a"] = True
        plane.start_api()
        cluster.wait_condition("Ready", "True")
        plane.stop_api()
        plane.start_api()
        cluster.remove()
        wait_for(cluster.is_gone, "the KataConfig has gone", LIMIT_S)
    assert cluster.nodes() == before
    assert cluster.left() == []


def test_at_rest_it_asks_for_nothing(cluster: Cluster) -> None:
    """Heartbeats of nodes, pods of others and a KataConfig that says the same cost no request."""
    plane = cluster.plane
    plane.merge("/api/v1/nodes/node-a", {"metadata": {"labels": {"pool": "vm"}}})

    def settled() -> int:
        """The number of requests when all that was done before has been seen: a label without a proof is removed."""
        plane.merge("/api/v1/nodes/node-c", {"metadata": {"labels": {"katapod.io/runtime": "ready"}}})
        wait_for(lambda: "katapod.io/runtime" not in cluster.nodes()["node-c"][0], "it has been seen", LIMIT_S)
        return len(plane.operator_requests())

    with operating(plane):
        cluster.apply(kataConfigPoolSelector={"matchLabels": {"pool": "vm"}})
        cluster.wait_condition("Ready", "True")
        wait_for(lambda: not plane.items("/apis/batch/v1/namespaces/katapod/jobs"), "jobs have gone", LIMIT_S)
        before = settled()
        for number in range(20):
            beat = {"type": "Ready", "status": "True", "reason": f"beat-{number}"}
            plane.merge("/api/v1/nodes/node-a/status", {"status": {"conditions": [beat]}})
        plane.ask("POST", "/api/v1/namespaces/default/pods", sandboxed_pod("bystander"))
        cluster.apply(kataConfigPoolSelector={"matchLabels": {"pool": "vm"}})
        after = settled()
        plane.ask("DELETE", "/api/v1/namespaces/default/pods/bystander", {"gracePeriodSeconds": 0})
        asked = [verb for verb, path in plane.operator_requests()[before:after] if "watch=true" not in path]
        assert asked == ["patch"], "of the label that tells us"


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ({"enablePeerPods": True}, "spec.enablePeerPods"),
        ({"logLevel": "loud"}, "spec.logLevel"),
        ({"backend": "Helm"}, "spec.backend"),
        ({"accelerators": ["xen"]}, "spec.accelerators"),
        ({"accelerators": []}, "spec.accelerators"),
        ({"rollout": {"maxUnavailable": 0}}, "spec.rollout.maxUnavailable"),
        ({"runtimeClasses": [{"name": "Not A Name"}]}, "spec.runtimeClasses"),
        ({"runtimeClasses": [{"name": "a"}, {"name": "a"}]}, "spec.runtimeClasses[1]"),
        ({"runtimeClasses": [{"name": "a", "overhead": {"memory": "much"}}]}, "overhead.memory"),
        ({"kataConfigPoolSelector": {"matchLabels": {"a": "not a value"}}}, "spec.kataConfigPoolSelector.matchLabels"),
        ({"kataConfigPoolSelector": {"matchExpressions": [{"key": "a", "operator": "Near"}]}}, "operator"),
    ],
)
def test_the_api_server_refuses_what_does_not_fit(plane: ControlPlane, spec: dict[str, Any], path: str) -> None:
    body = {"apiVersion": "kataconfiguration.openshift.io/v1", "kind": "KataConfig", "metadata": {"name": "bad"}}
    with pytest.raises(ApiError) as refused:
        plane.ask("POST", CONFIGS, {**body, "spec": spec})
    assert refused.value.code == 422
    assert path in str(refused.value)


@pytest.mark.parametrize(
    "what",
    ["get secrets -A", "create pods -n katapod", "delete nodes", "list jobs -n default", "create clusterroles"],
)
def test_what_the_operator_may_not(plane: ControlPlane, what: str) -> None:
    words = ["auth", "can-i", *what.split(), "--as=system:serviceaccount:katapod:katapod-operator"]
    assert plane.kubectl(*words, check=False).stdout.strip() == "no"
