"""The operator on a real Kubernetes: its pod and its node jobs are the kubelet's, the node has nothing of ours before.

What is typed is in kit.tour_steps: the walkthrough's rows W1 to W4, W9 and W21, which docs/walkthrough.md shows.
"""

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from kit.cluster_tour import KATACONFIG, ClusterTour, needs_images
from kit.control_plane import version
from kit.kata import wait_for
from kit.kubernetes import NODE, Kubernetes, kubernetes_running, needs_kubelet, pod
from kit.operator_cluster import CLASSES, CONFIGS, JOBS, TOP

pytestmark = [needs_kubelet, needs_images, pytest.mark.timeout(5400)]

CONFIG = f"{CONFIGS}/example-kataconfig"
PODS = "/api/v1/namespaces/default/pods"
ENGINE_CONFIG = "/etc/containerd/config.toml"


@pytest.fixture(scope="module")
def cluster(accelerator: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubernetes]:
    with kubernetes_running(tmp_path_factory.mktemp("kubernetes"), installed=False) as found:
        yield found


class Before:
    """The node as it was."""

    def __init__(self, cluster: Kubernetes) -> None:
        self.cluster = cluster
        self.files, self.config, self.words = self.now()

    def now(self) -> tuple[dict[str, str], str, dict[str, Any]]:
        """What an installation may write to, the engine's configuration, and labels, annotations and taints."""
        node = self.cluster.plane.ask("GET", f"/api/v1/nodes/{NODE}")
        words = {key: node["metadata"].get(key) for key in ("labels", "annotations")}
        return (
            self.cluster.node.files(),
            self.cluster.host("cat", ENGINE_CONFIG),
            words | {"spec": node["spec"]},
        )


@pytest.fixture(scope="module")
def tour(cluster: Kubernetes, tmp_path_factory: pytest.TempPathFactory) -> ClusterTour:
    return ClusterTour(cluster, tmp_path_factory.mktemp("tour"))


@pytest.fixture(scope="module")
def before(tour: ClusterTour) -> Before:
    return Before(tour.cluster)


@pytest.fixture(scope="module")
def installed(tour: ClusterTour, before: Before) -> Before:
    """The node has it, and its RuntimeClass can be used."""
    tour("W4 payload")
    return before


@pytest.fixture(scope="module")
def used(tour: ClusterTour, installed: Before) -> Before:
    """A Deployment has a pod of it."""
    tour("W21 processes")
    return installed


def test_w01_from_one_kataconfig(installed: Before, tour: ClusterTour, cluster: Kubernetes) -> None:
    """The kubelet runs the operator, and the job that changes the node; the status tells of it."""
    table = tour("W1 get").splitlines()
    assert table[0].split() == ["NAME", "INPROGRESS", "COMPLETED", "TOTAL", "AGE", "SUMMARY"]
    assert table[1].endswith("1 of 1 nodes are ready")
    (node,) = status(cluster)["nodes"]
    assert node["phase"] == "Ready"
    assert node["accelerator"] in ("kvm", "uml", "tcg")
    assert node["proofSeconds"] > 0
    assert node["kernel"] not in ("", os.uname().release)
    assert NODE in tour("W1 status")
    assert "NodeReady" in tour("W1 events")


def status(cluster: Kubernetes) -> dict[str, Any]:
    found: dict[str, Any] = cluster.plane.ask("GET", CONFIG)["status"]
    return found


def test_the_operators_pod_serves_the_webhook(installed: Before, cluster: Kubernetes) -> None:
    """It is Ready by that, and the API server asks it by its Service."""
    condition = ("--for=condition=Available", "deployment/katapod-operator", "--timeout=10m")
    cluster.kubectl("wait", "--namespace", "katapod", *condition, limit_s=660)
    second = KATACONFIG.replace("example-kataconfig", "second")
    refused = cluster.plane.kubectl("apply", "-f", "-", text=second, check=False)
    assert refused.returncode != 0
    assert "there is one KataConfig already" in refused.stderr


def test_w02_the_class(installed: Before, tour: ClusterTour, cluster: Kubernetes) -> None:
    assert "handler: kata" in tour("W2 class")
    found = cluster.plane.ask("GET", f"{CLASSES}/kata")
    assert found["overhead"] == {"podFixed": {"cpu": "250m", "memory": "350Mi"}}
    assert found["scheduling"]["nodeSelector"] == {"katapod.io/runtime": "ready"}


def test_w03_what_the_node_has(installed: Before, tour: ClusterTour) -> None:
    assert tour("W3 nodes").splitlines()[1].split()[-2] == "ready"
    block = tour("W3 engine")
    assert installed.config + block == tour.cluster.host("cat", ENGINE_CONFIG)
    assert "containerd.runtimes.kata]" in block


def test_w04_the_payload(installed: Before, tour: ClusterTour) -> None:
    assert {"kata-runtime", "containerd-shim-kata-v2", "kata-monitor"} <= set(tour("W4 payload").split())


def test_w09_a_deployment(used: Before, tour: ClusterTour, cluster: Kubernetes) -> None:
    assert tour("W9 pods").splitlines()[1].split()[1:3] == ["1/1", "Running"]
    (pod,) = cluster.plane.items(PODS)
    assert pod["spec"]["overhead"] == {"cpu": "250m", "memory": "350Mi"}


def test_w21_in_the_container(used: Before, tour: ClusterTour, cluster: Kubernetes) -> None:
    assert tour("W21 uname").strip() not in ("", os.uname().release)
    (pod,) = cluster.plane.items(PODS)
    assert f"inet {pod['status']['podIP']}/" in tour("W21 address")
    commands = [line.split(None, 2)[2] for line in tour("W21 processes").splitlines()[1:]]
    assert commands == ["sleep infinity", "ps -o pid,tty,args"]


def accelerators(cluster: Kubernetes) -> list[str]:
    """By what the sandboxes of the node run."""
    names = cluster.host("ls", "/run/vc/sbs").split()
    records = [json.loads(cluster.host("cat", f"/run/vc/sbs/{name}/persist.json")) for name in names]
    return [one["accelerator"] for one in records]


def test_by_what_the_pod_runs(used: Before, cluster: Kubernetes) -> None:
    """User-mode Linux takes pods whose memory is announced, as kubelets do since 1.23; others get the next best."""
    (node,) = status(cluster)["nodes"]
    announced = version("kubelet") >= (1, 23)
    assert accelerators(cluster) == ["tcg" if node["accelerator"] == "uml" and not announced else node["accelerator"]]


@pytest.fixture(scope="module")
def figures(used: Before, cluster: Kubernetes) -> str:
    """What kata-monitor's pod has said on the node, where it is no more. Not in a test, as `own_class` is not."""
    manifest = str(TOP / "packaging/operator/monitoring/monitor.yaml")
    pods = "/api/v1/namespaces/katapod/pods"
    cluster.kubectl("apply", "-f", manifest)
    cluster.kubectl("rollout", "status", "-n", "katapod", "daemonset/katapod-monitor", "--timeout=10m", limit_s=660)
    (name,) = (
        one["metadata"]["name"]
        for one in cluster.plane.items(f"{pods}?labelSelector=app.kubernetes.io/name%3Dkatapod-monitor")
    )
    found: str = wait_for(
        lambda: cluster.plane.kubectl("get", "--raw", f"{pods}/{name}:8090/proxy/metrics", check=False).stdout,
        "it is served",
        period_s=1,
    )
    cluster.kubectl("delete", "-f", manifest, "--wait=false")
    wait_for(lambda: len(cluster.plane.items(pods)) == 1, "its pod goes", 600, 1)
    return found


def test_a_monitor_that_has_no_rights(used: Before, figures: str, cluster: Kubernetes) -> None:
    """The DaemonSet's pod comes to the node that has Katapod, and has figures of the sandbox there."""
    assert "kata_monitor_running_shim_count 1" in figures
    (sandbox,) = cluster.host("ls", "/run/vc/sbs").split()
    assert f'sandbox_id="{sandbox}"' in figures


@pytest.fixture(scope="module")
def before_own_class(used: Before, cluster: Kubernetes) -> dict[str, Any]:
    """The Deployment's pod."""
    (found,) = cluster.plane.items(PODS)
    return found


@pytest.fixture(scope="module")
def own_class(before_own_class: dict[str, Any], cluster: Kubernetes) -> str:
    """A class with a configuration of its own, which has come while a pod runs.

    Not in a test: its node job is runc's, of whose pods a kubelet of 1.20 leaves the cgroups in version 2's hierarchy.
    """
    plane, name = cluster.plane, "kata-own"
    (node,) = status(cluster)["nodes"]
    told = f'[katapod]\naccelerator = "{node["accelerator"]}"\n'
    plane.merge(CONFIG, {"spec": {"runtimeClasses": [{"name": "kata"}, {"name": name, "configuration": told}]}})
    wait_for(
        lambda: [one for one in plane.items(CLASSES) if one["metadata"]["name"] == name], "there is a class", 1800, 1
    )
    return name


def test_a_class_with_a_configuration_of_its_own(
    before_own_class: dict[str, Any], own_class: str, cluster: Kubernetes
) -> None:
    """The pod that ran lives on; pods of the class run by what it says, whatever the kubelet announces."""
    plane = cluster.plane
    (node,) = status(cluster)["nodes"]
    assert plane.ask("GET", f"{CLASSES}/{own_class}")["handler"] == own_class
    cluster.apply(pod("own", "sleep", "infinity", runtimeClassName=own_class))
    cluster.kubectl("wait", "--for=condition=Ready", "pod/own", "--timeout=30m", limit_s=1900)
    assert node["accelerator"] in accelerators(cluster)
    assert cluster.kubectl("exec", "own", "--", "uname", "-r").strip() not in ("", os.uname().release)
    cluster.kubectl("delete", "pod", "own", "--wait=false")
    wait_for(lambda: len(plane.items(PODS)) == 1, "its pod goes", 600, 1)
    (after,) = plane.items(PODS)
    assert after["status"]["containerStatuses"] == before_own_class["status"]["containerStatuses"]


@pytest.fixture(scope="module")
def removal(tour: ClusterTour, used: Before) -> dict[str, Any]:
    """What was seen while the pod held it up; then the pod ended, and all has gone."""
    plane = tour.cluster.plane
    (pod,) = plane.items(PODS)
    name = pod["metadata"]["name"]
    blocked = tour("W1 blocked")
    (still,) = plane.items(PODS)
    seen = {"name": name, "blocked": blocked, "events": plane.kubectl("get", "events").stdout}
    seen["container"] = [one["status"]["containerStatuses"][0]["containerID"] for one in (pod, still)]
    seen["alive"] = plane.kubectl("exec", name, "--", "echo", "alive").stdout
    tour("W1 gone")
    return seen


def test_removed_when_no_pod_needs_it(
    used: Before, tour: ClusterTour, cluster: Kubernetes, removal: dict[str, Any]
) -> None:
    """A pod that runs is waited for, and named, and lives on; then the node is as it was, byte for byte."""
    plane = cluster.plane
    assert f"deletion waits for 1 pods: default/{removal['name']}" in removal["blocked"]
    assert f"default/{removal['name']}" in removal["events"]
    assert removal["container"][0] == removal["container"][1]
    assert removal["alive"] == "alive\n"
    files, config, words = used.now()
    assert files == used.files
    assert config == used.config
    assert words == used.words
    assert plane.items(CLASSES) == []
    assert plane.items(JOBS) == []
    # the operator's own pod, which is in no VM, has a network namespace still
    assert [one for one in cluster.sandboxes() if not one.startswith("/run/netns/")] == []
