"""The operator when something breaks: it is killed between any two requests, the API server goes, nodes go, and
KataConfigs that make no sense. It ends in the right state, with everything done once and nothing left."""

import contextlib
import json
import signal
import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from katapod.operator.cluster.decide import Observed, decide, needs_pods
from katapod.operator.cluster.objects import Settings
from katapod.operator.cluster.views import parse_config, parse_node
from kit.control_plane import ApiError, ControlPlane, needs_control_plane
from kit.kata import wait_for
from kit.operator_cluster import (
    CONFIGS,
    JOBS,
    LIMIT_S,
    NODES,
    TOP,
    WEBHOOK,
    Cluster,
    cluster_of,
    operating,
    operator_plane,
    sandboxed_pod,
    start_operator,
)

pytestmark = [needs_control_plane, pytest.mark.timeout(1800)]

RESTARTS_LIMIT_S = 800.0  # some fifty starts of a process
POD = "/api/v1/namespaces/default/pods/one"
EVERYTHING = sorted((action, node) for action in ("install", "uninstall") for node in NODES)


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    with operator_plane(tmp_path_factory.mktemp("plane")) as found:
        yield found


@pytest.fixture
def cluster(plane: ControlPlane) -> Iterator[Cluster]:
    with cluster_of(plane) as found:
        yield found


def changes_asked_for(plane: ControlPlane) -> int:
    """How many requests of the operator have changed something, the lease's left out."""
    changing = ("create", "patch", "delete", "update")
    return sum(verb in changing and "/leases" not in path for verb, path in plane.operator_requests())


def test_killed_after_every_request(cluster: Cluster) -> None:
    """A process that was killed after one change has the next one made by another, as when a container is restarted."""
    plane, before, stop = cluster.plane, cluster.nodes(), threading.Event()
    kills = []

    def kill_and_start() -> None:
        while not stop.is_set():
            asked = changes_asked_for(plane)
            process = start_operator(plane, "restarted")
            while not stop.is_set() and changes_asked_for(plane) == asked and process.poll() is None:
                stop.wait(0.02)
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills.append(asked)

    killer = threading.Thread(target=kill_and_start)
    killer.start()
    try:
        cluster.apply(rollout={"maxUnavailable": 3}, configuration="[runtime]\nenable_debug = true\n")
        cluster.wait_condition("Ready", "True", limit_s=RESTARTS_LIMIT_S)
        cluster.remove()
        wait_for(cluster.is_gone, "the KataConfig has gone", RESTARTS_LIMIT_S)
    finally:
        stop.set()
        killer.join()
    assert len(kills) > 10
    assert cluster.nodes() == before
    assert cluster.left() == []
    assert sorted(cluster.kubelet.ran) == EVERYTHING


def again(plane: ControlPlane) -> None:
    plane.stop_api()
    plane.start_api()


def test_the_api_server_goes_in_each_phase(cluster: Cluster) -> None:
    plane, before = cluster.plane, cluster.nodes()
    with operating(plane):
        again(plane)  # before there is anything
        cluster.outcomes["node-a"] = None
        cluster.apply(rollout={"maxUnavailable": 3})
        wait_for(lambda: cluster.kubelet.ran, "the canary's job is at work", LIMIT_S)
        again(plane)
        cluster.outcomes["node-a"] = True
        wait_for(lambda: len(cluster.kubelet.ran) == 3, "the others' jobs have begun", LIMIT_S)
        again(plane)
        cluster.wait_condition("Ready", "True")
        plane.ask("POST", "/api/v1/namespaces/default/pods", sandboxed_pod("one"))
        wait_for(lambda: plane.ask("GET", POD)["spec"].get("nodeName"), "the pod has a node", LIMIT_S)
        again(plane)
        cluster.remove()
        cluster.wait_condition("Blocked", "True")
        again(plane)
        plane.ask("DELETE", POD, {"gracePeriodSeconds": 0})
        wait_for(lambda: any(action == "uninstall" for action, _ in cluster.kubelet.ran), "nodes are cleaned", LIMIT_S)
        again(plane)
        wait_for(cluster.is_gone, "the KataConfig has gone", LIMIT_S)
    assert cluster.nodes() == before
    assert cluster.left() == []
    assert sorted(cluster.kubelet.ran) == EVERYTHING


@pytest.mark.parametrize("stage", ["waiting", "installing", "failed", "ready", "uninstalling"])
def test_a_node_disappears(cluster: Cluster, stage: str) -> None:
    """And the others go on; of the one that is gone no job and no line is left."""
    plane, gone = cluster.plane, "/api/v1/nodes/node-a"
    if stage == "waiting":
        gone = "/api/v1/nodes/node-c"
    cluster.outcomes["node-a"] = {"waiting": None, "installing": None, "failed": False}.get(stage, True)
    with operating(plane):
        cluster.apply()
        match stage:
            case "waiting" | "installing":
                wait_for(lambda: cluster.kubelet.ran, "the canary's job is at work", LIMIT_S)
            case "failed":
                cluster.wait_condition("Degraded", "True", "NodesFailed")
            case _:
                cluster.wait_condition("Ready", "True")
        if stage == "uninstalling":
            cluster.removals["node-a"] = None
            cluster.remove()
            wait_for(lambda: ("uninstall", "node-a") in cluster.kubelet.ran, "it is being cleaned", LIMIT_S)
        plane.ask("DELETE", gone)
        name = gone.rpartition("/")[2]
        cluster.outcomes["node-a"] = True
        if stage != "uninstalling":
            cluster.wait_condition("Ready", "True")
            wait_for(
                lambda: sorted(one["name"] for one in cluster.status()["nodes"]) == sorted({*NODES} - {name}),
                "the others have lines",
                LIMIT_S,
            )
            assert cluster.condition("Degraded")["status"] == "False"
            cluster.remove()
        wait_for(cluster.is_gone, "the KataConfig has gone", LIMIT_S)
    assert cluster.left() == []
    assert plane.items(JOBS) == []
    assert all(not notes for _, notes in cluster.nodes().values())


def test_an_upgrade_drains_as_budgets_allow(cluster: Cluster) -> None:
    plane = cluster.plane
    budgets = "/apis/policy/v1beta1/namespaces/default/poddisruptionbudgets"
    with operating(plane):
        cluster.apply(rollout={"drain": True})
        cluster.wait_condition("Ready", "True")
        pod = sandboxed_pod("one", nodeSelector={"kubernetes.io/hostname": "node-a"})
        pod["metadata"]["labels"] = {"app": "kept"}
        plane.ask("POST", "/api/v1/namespaces/default/pods", pod)
        wait_for(lambda: plane.ask("GET", POD)["spec"].get("nodeName"), "the pod has a node", LIMIT_S)
        plane.merge(f"{POD}/status", {"status": {"phase": "Running"}})
        spec = {"minAvailable": 1, "selector": {"matchLabels": {"app": "kept"}}}
        plane.ask("POST", budgets, {"metadata": {"name": "kept"}, "spec": spec})
        cluster.apply(rollout={"drain": True}, configuration="[runtime]\nenable_debug = true\n")
        told = cluster.wait_condition("Blocked", "True", "EvictionRefused")
        assert "node-a waits for default/one (" in told["message"]
        assert plane.ask("GET", "/api/v1/nodes/node-a")["spec"]["unschedulable"]
        assert len(cluster.kubelet.ran) == 3, "no job while the pod is there"
        plane.ask("DELETE", f"{budgets}/kept")
        wait_for(lambda: "deletionTimestamp" in plane.ask("GET", POD)["metadata"], "it is evicted", LIMIT_S)
        plane.ask("DELETE", POD, {"gracePeriodSeconds": 0})
        wait_for(lambda: len(cluster.kubelet.ran) == 6, "all nodes are installed anew", LIMIT_S)
        cluster.wait_condition("Ready", "True")
        wait_for(
            lambda: not any(one["spec"].get("unschedulable") for one in plane.items("/api/v1/nodes")),
            "all nodes take pods again",
            LIMIT_S,
        )


def test_drop_ins_are_rolled_out_and_refused(cluster: Cluster) -> None:
    plane = cluster.plane
    with operating(plane):
        cluster.apply(configuration="[hypervisor.qemu]\ndefault_memroy = 1\n")
        told = cluster.wait_condition("Degraded", "True", "Invalid")
        assert "spec.configuration:2: [hypervisor.qemu] default_memroy: unknown key; did you mean" in told["message"]
        assert cluster.kubelet.ran == []
        big = {"name": "kata-big", "configuration": "[hypervisor.qemu]\ndefault_memory = 1024\n"}
        cluster.apply(runtimeClasses=[{"name": "kata"}, big])
        cluster.wait_condition("Ready", "True")
        found = plane.ask("GET", "/apis/node.k8s.io/v1/runtimeclasses/kata-big")
        assert found["handler"] == "kata-big"
        plane.ask("POST", "/api/v1/namespaces/default/pods", sandboxed_pod("one", runtimeClassName="kata-big"))
        wait_for(lambda: plane.ask("GET", POD)["spec"].get("nodeName"), "a pod of it has a node", LIMIT_S)
        cluster.apply(runtimeClasses=[{"name": "kata"}])
        wait_for(
            lambda: (
                plane.ask("GET", "/apis/node.k8s.io/v1/runtimeclasses/kata-big")["scheduling"]["nodeSelector"][
                    "katapod.io/runtime"
                ]
                == "closed"
            ),
            "it is closed",
            LIMIT_S,
        )
        plane.ask("DELETE", POD, {"gracePeriodSeconds": 0})
        wait_for(
            lambda: [one["metadata"]["name"] for one in plane.items("/apis/node.k8s.io/v1/runtimeclasses")] == ["kata"],
            "it has gone",
            LIMIT_S,
        )
        wait_for(
            lambda: all(one.get("target") == "0.1.0" for one in cluster.status()["nodes"]),
            "so has its handler",
            LIMIT_S,
        )
        cluster.wait_condition("Ready", "True")


def test_the_webhook_refuses_at_once(cluster: Cluster) -> None:
    """By a certificate that the operator has made; and nothing that has to be let go."""
    plane, port = cluster.plane, free_port()
    hook = next(yaml.safe_load_all((TOP / "packaging/operator/webhook.yaml").read_text().partition("---")[2]))
    hook["webhooks"][0]["clientConfig"] = {"url": f"https://localhost:{port}/validate"}
    plane.ask("POST", WEBHOOK.rpartition("/")[0], hook)
    bad = {"configuration": "[hypervisor.qemu]\ndefault_memroy = 1\n"}
    body = {"apiVersion": "kataconfiguration.openshift.io/v1", "kind": "KataConfig"}
    try:
        cluster.apply("old", **bad)  # nobody answers yet
        cluster.remove("old")
        wait_for(lambda: cluster.is_gone("old"), "nobody holds it", LIMIT_S)
        with operating(plane, "", "--webhook", str(port)):

            def refusal(name: str, **spec: Any) -> str:
                return str(dry_run(plane, {**body, "metadata": {"name": name}, "spec": spec})[1] or "")

            wait_for(
                lambda: "unknown key; did you mean default_memory?" in refusal("kata", **bad), "it refuses", LIMIT_S
            )
            assert "spec.configuration:2: [hypervisor.qemu] default_memroy" in refusal("kata", **bad)
            assert refusal("kata") == ""
            cluster.apply()
            cluster.wait_condition("Ready", "True")
            assert "there is one KataConfig already, kata," in refusal("second")
            changed = plane.kubectl(
                "patch", "kataconfig", "kata", "--type=merge", "-p", json.dumps({"spec": bad}), check=False
            )
            assert "default_memroy" in changed.stderr
            cluster.remove()
            wait_for(cluster.is_gone, "the KataConfig has gone", LIMIT_S)
    finally:
        plane.ask("DELETE", WEBHOOK)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


TEXT = st.text(max_size=8) | st.sampled_from(["kata", "kvm", "uml", "In", "Exists", "a/b", "250m", "64Mi", "measured"])
ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
TOML = st.sampled_from(
    ["", "[runtime]\nenable_debug = true\n", "[hypervisor.qemu]\ndefault_memory = 'x'\n", "[", "x = 1"]
)
REQUIREMENT = st.fixed_dictionaries(
    {"key": TEXT, "operator": st.sampled_from(["In", "NotIn", "Exists", "DoesNotExist"])},
    optional={"values": st.lists(TEXT, max_size=2)},
)
SELECTOR = st.fixed_dictionaries(
    {},
    optional={
        "matchLabels": st.dictionaries(TEXT, TEXT, max_size=2),
        "matchExpressions": st.lists(REQUIREMENT, max_size=2),
    },
)
OVERHEAD = st.fixed_dictionaries({}, optional={"mode": TEXT, "cpu": TEXT, "memory": TEXT})
CLASS = st.fixed_dictionaries(
    {"name": st.sampled_from(["kata", "kata-2", "other"]) | TEXT},
    optional={"handler": TEXT, "accelerator": TEXT, "overhead": OVERHEAD | ANY, "configuration": TOML},
)
SPEC = st.fixed_dictionaries(
    {},
    optional={
        "kataConfigPoolSelector": SELECTOR | ANY,
        "checkNodeEligibility": st.booleans() | ANY,
        "accelerators": st.lists(st.sampled_from(["kvm", "uml", "tcg", "xen"]), max_size=3) | ANY,
        "runtimeClasses": st.lists(CLASS, max_size=3) | ANY,
        "configuration": TOML | ANY,
        "rollout": st.fixed_dictionaries(
            {},
            optional={"maxUnavailable": st.integers(-1, 2000), "canary": st.booleans(), "drain": st.booleans() | ANY},
        )
        | ANY,
    },
)


def dry_run(plane: ControlPlane, body: dict[str, Any]) -> tuple[dict[str, Any], ApiError | None]:
    try:
        return plane.ask("POST", f"{CONFIGS}?dryRun=All", body), None
    except ApiError as exc:
        return {}, exc


def test_any_kataconfig_is_refused_or_followed(plane: ControlPlane) -> None:
    """By the API server with the field's path, or by us with it; what neither refuses leads to objects that the API
    server takes."""
    node = {
        "metadata": {"name": "n", "uid": "u", "labels": {}},
        "status": {"conditions": [{"type": "Ready", "status": "True"}]},
    }
    seen = {"refused": 0, "invalid": 0, "followed": 0}

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(SPEC)
    def one(spec: dict[str, Any]) -> None:
        body = {"apiVersion": "kataconfiguration.openshift.io/v1", "kind": "KataConfig", "metadata": {"name": "fuzz"}}
        accepted, refusal = dry_run(plane, {**body, "spec": spec})
        if refusal is not None:
            assert refusal.code in (400, 422), refusal
            assert "spec" in str(refusal) or "cannot" in str(refusal), refusal
            seen["refused"] += 1
            return
        accepted["metadata"]["finalizers"] = ["kataconfiguration.openshift.io/finalizer"]
        observed = Observed((parse_config(accepted),), (parse_node(node),), (), (), (), None, datetime.now(UTC))
        plan_settings = Settings("katapod", "katapod.io/node:1", "1")
        assert not needs_pods(observed, plan_settings)
        plan = decide(observed, plan_settings)
        status = msgspec.to_builtins(plan.statuses["fuzz"])
        if plan.changes == () and "Invalid" in json.dumps(status):
            assert "spec" in status["summary"]
            seen["invalid"] += 1
        else:
            seen["followed"] += 1
            for change in plan.changes:
                if hasattr(change, "body"):
                    plane.ask("POST", f"{JOBS}?dryRun=All", change.body)
        plane.ask("POST", f"{CONFIGS}?dryRun=All", {**body, "spec": {}, "status": status})

    one()
    assert all(seen.values()), seen


def test_a_status_as_large_as_it_can_be_is_taken(cluster: Cluster) -> None:
    """Texts of nodes are somebody else's: long ones, and of any characters."""
    long = {"action": "install", "ok": False, "target": "0.1.0", "stage": "proof", "message": "\u0000ä\n\t" * 900}
    cluster.messages["node-a"] = json.dumps(long)
    cluster.outcomes["node-a"] = False
    with operating(cluster.plane):
        cluster.apply()
        cluster.wait_condition("Degraded", "True", "NodesFailed")
        with contextlib.suppress(ApiError):
            assert len(json.dumps(cluster.status())) < 10_000
