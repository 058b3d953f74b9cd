"""Many pods in VMs at once on a real kubelet, and what the scheduler counts of them: their class's overhead."""

from collections.abc import Iterator
from typing import Any

import pytest

from kit.kata import wait_for
from kit.kubernetes import NODE, OVERHEAD_MIB, RUNTIME_CLASS, Kubernetes, Namespace, needs_kubelet, pod

pytestmark = [needs_kubelet, pytest.mark.timeout(3600)]

COUNT = 20
SLEEP = ("sleep", "infinity")
UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def test_twenty_at_once(ns: Namespace, cluster: Kubernetes) -> None:
    """Each in a VM of its own; deleted at once as well, they leave nothing on the node."""
    before = footprint(cluster)
    names = [f"pod-{number}" for number in range(COUNT)]
    ns.apply(*(pod(name, *SLEEP) for name in names))
    ns.wait_ready(*names)
    found = ns.pods()
    assert len({one["status"]["podIP"] for one in found}) == COUNT
    assert sum(one["status"]["containerStatuses"][0]["restartCount"] for one in found) == 0
    assert len(cluster.host("ls", "/run/vc/sbs").split()) == COUNT
    assert len({ns.exec(name, "cat", "/proc/sys/kernel/random/boot_id") for name in names}) == COUNT
    ns.kubectl("delete", "pods", "--all", "--wait=false")
    wait_for(lambda: not ns.pods(), "the pods go", 1200, 0.5)
    wait_for(lambda: footprint(cluster) == before, "the node is as before", 600, 0.5)
    assert cluster.sandboxes() == []


def footprint(cluster: Kubernetes) -> list[str]:
    """What pods have on the node: containers, shims, mounts."""
    containers = cluster.host("ctr", "--namespace", "k8s.io", "containers", "list", "--quiet").split()
    tasks = cluster.host("ctr", "--namespace", "k8s.io", "tasks", "list", "--quiet").split()
    mounts = [line.split()[4] for line in cluster.host("cat", "/proc/self/mountinfo").splitlines()]
    return sorted(containers + tasks + mounts)


@pytest.fixture
def large_class(cluster: Kubernetes) -> Iterator[str]:
    """A RuntimeClass by whose overhead one pod fits on the node, and a second one does not."""
    overhead = {"podFixed": {"memory": str(free_memory(cluster) * 2 // 3)}}
    cluster.apply({**RUNTIME_CLASS, "metadata": {"name": "kata-large"}, "overhead": overhead})
    yield "kata-large"
    cluster.kubectl("delete", "runtimeclass", "kata-large")


def free_memory(cluster: Kubernetes) -> int:
    """Bytes that the scheduler can still give: what is allocatable, less requests and overheads."""
    allocatable = cluster.plane.ask("GET", f"/api/v1/nodes/{NODE}")["status"]["allocatable"]["memory"]
    taken = 0
    for one in cluster.plane.items(f"/api/v1/pods?fieldSelector=spec.nodeName%3D{NODE}"):
        taken += quantity(one["spec"].get("overhead", {}).get("memory", "0"))
        for each in one["spec"]["containers"]:
            taken += quantity(each["resources"].get("requests", {}).get("memory", "0"))
    return quantity(allocatable) - taken


def quantity(text: str) -> int:
    return int(text[:-2]) * UNITS[text[-2:]] if text[-2:] in UNITS else int(text)


def test_the_scheduler_counts_the_overhead(ns: Namespace, cluster: Kubernetes, large_class: str) -> None:
    """None of these pods requests anything: one that does not fit by its overhead waits, and the reason is said."""
    free = free_memory(cluster)
    ns.start("first", *SLEEP, runtimeClassName=large_class)
    assert free_memory(cluster) == free - quantity(ns.get("first")["spec"]["overhead"]["memory"])
    ns.apply(pod("second", *SLEEP, runtimeClassName=large_class))

    def refusal() -> dict[str, Any]:
        conditions = ns.get("second")["status"].get("conditions", ())
        found: dict[str, Any] = next((one for one in conditions if one["type"] == "PodScheduled"), {})
        return found

    wait_for(refusal, "the scheduler has looked at it", period_s=0.5)
    assert (refusal()["status"], refusal()["reason"]) == ("False", "Unschedulable")
    assert "Insufficient memory" in refusal()["message"]
    assert free_memory(cluster) > OVERHEAD_MIB << 20
    ns.start("small", *SLEEP)
    assert ns.get("second")["status"]["phase"] == "Pending"
    ns.kubectl("delete", "pod", "first", "--wait=false")
    ns.wait_ready("second")
