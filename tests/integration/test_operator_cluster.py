"""The operator against a real API server, controllers and scheduler, with the rights of its own account.

There is no kubelet: what node jobs come to is said by kit.control_plane.SimulatedKubelet.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from kit.control_plane import ApiError, ControlPlane, needs_control_plane
from kit.kata import wait_for
from kit.operator_cluster import (
    CLASSES,
    CONFIGS,
    JOBS,
    LEASE,
    LIMIT_S,
    NODES,
    Cluster,
    cluster_of,
    operating,
    operator_plane,
    sandboxed_pod,
    start_operator,
)

pytestmark = [needs_control_plane, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    with operator_plane(tmp_path_factory.mktemp("plane")) as found:
        yield found


@pytest.fixture
def cluster(plane: ControlPlane) -> Iterator[Cluster]:
    with cluster_of(plane) as found:
        yield found


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
    """After another number of requests each time; as the kubelet starts a container again."""
    plane, before, stop = cluster.plane, cluster.nodes(), threading.Event()

    def kill_and_start() -> None:
        asks = 3
        while not stop.is_set():
            last = len(plane.operator_requests()) + asks
            process = start_operator(plane, "restarted")
            while not stop.is_set() and len(plane.operator_requests()) < last:
                stop.wait(0.05)
            process.send_signal(signal.SIGKILL)
            process.wait()
            asks = asks + 4 if asks < 40 else 3

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


def test_another_takes_over_from_one_that_was_killed(cluster: Cluster) -> None:
    """It has watched all the time, and begins when the lease is over; what was half done is finished, once."""
    plane, before = cluster.plane, cluster.nodes()
    cluster.outcomes["node-a"] = None
    killed = start_operator(plane, "first")
    try:
        wait_for(lambda: holder(plane) == "first", "it holds the lease", LIMIT_S)
        with operating(plane, "second"):
            cluster.apply()
            wait_for(lambda: cluster.kubelet.ran, "the first job is at work", LIMIT_S)
            assert holder(plane) == "first"
            killed.send_signal(signal.SIGKILL)
            killed.wait()
            cluster.outcomes["node-a"] = True
            cluster.wait_condition("Ready", "True")
            assert holder(plane) == "second"
            assert plane.ask("GET", LEASE)["spec"]["leaseTransitions"] >= 1
            cluster.remove()
            wait_for(cluster.is_gone, "the KataConfig has gone", LIMIT_S)
    finally:
        killed.kill()
        killed.wait()
    assert holder(plane) == "", "one that ends lets the next begin at once"
    assert cluster.nodes() == before
    assert cluster.left() == []
    assert sorted(cluster.kubelet.ran) == sorted((action, n) for action in ("install", "uninstall") for n in NODES)


def test_one_that_is_frozen_does_nothing_when_it_comes_back(cluster: Cluster) -> None:
    """It held the lease, could not renew it, and is told of changes as soon as it runs again."""
    plane = cluster.plane
    with operating(plane, "frozen") as frozen:
        wait_for(lambda: holder(plane) == "frozen", "it holds the lease", LIMIT_S)
        frozen.send_signal(signal.SIGSTOP)
        try:
            with operating(plane, "second"):
                cluster.apply()
                cluster.wait_condition("Ready", "True")
                frozen.send_signal(signal.SIGCONT)
                plane.merge("/api/v1/nodes/node-c", {"metadata": {"labels": {"pool": "vm"}}})
                cluster.apply(kataConfigPoolSelector={"matchLabels": {"pool": "vm"}})
                wait_for(lambda: len(cluster.status()["nodes"]) == 1, "two nodes are clean again", LIMIT_S)
                assert holder(plane) == "second"
        finally:
            frozen.send_signal(signal.SIGCONT)
    uninstalled = [node for action, node in cluster.kubelet.ran if action == "uninstall"]
    assert sorted(uninstalled) == ["node-a", "node-b"]


def holder(plane: ControlPlane) -> str:
    with contextlib.suppress(ApiError):
        return str(plane.ask("GET", LEASE)["spec"]["holderIdentity"])
    return ""


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
        wait_for(lambda: not plane.items(JOBS), "jobs have gone", LIMIT_S)
        before = settled()
        for number in range(20):
            beat = {"type": "Ready", "status": "True", "reason": f"beat-{number}"}
            plane.merge("/api/v1/nodes/node-a/status", {"status": {"conditions": [beat]}})
        plane.ask("POST", "/api/v1/namespaces/default/pods", sandboxed_pod("bystander"))
        cluster.apply(kataConfigPoolSelector={"matchLabels": {"pool": "vm"}})
        after = settled()
        plane.ask("DELETE", "/api/v1/namespaces/default/pods/bystander", {"gracePeriodSeconds": 0})
        asked = plane.operator_requests()[before:after]
        asked = [(verb, path) for verb, path in asked if "watch=true" not in path and "/leases" not in path]
        assert [verb for verb, _ in asked] == ["patch"], "of the label that tells us"


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
