"""What a cluster counts of pods in VMs: quotas with the overhead, and the kubelet's figures for `kubectl top`."""

from typing import Any

import pytest

from kit.control_plane import ApiError, version
from kit.kata import wait_for
from kit.kubernetes import NODE, OVERHEAD_CPU_MILLIS, OVERHEAD_MIB, Namespace, needs_kubelet, pod

pytestmark = [needs_kubelet, pytest.mark.timeout(1800)]

SLEEP = ("sleep", "infinity")
LIMITS = {"memory": "64Mi", "cpu": "500m"}


def test_a_quota_counts_the_overhead(ns: Namespace) -> None:
    """Of requests and limits, and a pod that does not fit is refused. Kubernetes before 1.21 counts containers only:
    its issue 99577."""
    counted = version("kube-apiserver") >= (1, 21)
    memory, cpu = 64 + OVERHEAD_MIB * counted, 500 + OVERHEAD_CPU_MILLIS * counted
    hard = {"limits.memory": f"{memory + 63}Mi", "limits.cpu": "2", "requests.memory": "2Gi", "requests.cpu": "2"}
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "q"}, "spec": {"hard": hard}}
    ns.apply(quota)

    def used() -> dict[str, str]:
        found: dict[str, str] = ns.plane.ask("GET", f"{ns.root}/resourcequotas/q").get("status", {}).get("used", {})
        return found

    wait_for(used, "the quota is at work")
    ns.apply(pod("one", *SLEEP, main={"resources": {"limits": LIMITS}}))
    expected = {f"{kind}.memory": f"{memory}Mi" for kind in ("limits", "requests")}
    expected |= {f"{kind}.cpu": f"{cpu}m" for kind in ("limits", "requests")}
    wait_for(lambda: used() == expected, f"it is charged {expected}")
    body = pod("two", *SLEEP, main={"resources": {"limits": LIMITS}})
    with pytest.raises(ApiError, match="exceeded quota") as refused:
        ns.plane.ask("POST", f"{ns.root}/pods", body)
    assert refused.value.code == 403


def test_the_kubelets_figures(ns: Namespace) -> None:
    """Of each container: its memory, that of /dev/shm too, and its CPU time; as metrics servers ask for them."""
    ns.start("one", *SLEEP, main={"resources": {"limits": {"memory": "128Mi"}}})
    idle = working_set(wait_for(lambda: figures(ns, "one"), "there are figures", period_s=1))
    assert 0 < idle < 32 << 20
    ns.sh("one", "dd if=/dev/zero of=/dev/shm/filling bs=1048576 count=48")
    wait_for(lambda: working_set(figures(ns, "one")) >= idle + (40 << 20), "the filling is counted", period_s=1)
    before = figures(ns, "one")["cpu"]["usageCoreNanoSeconds"]
    ns.sh("one", "n=0; while test $n -lt 20000; do n=$((n + 1)); done")
    wait_for(lambda: figures(ns, "one")["cpu"]["usageCoreNanoSeconds"] > before, "its work is counted", period_s=1)


def figures(ns: Namespace, name: str) -> dict[str, Any]:
    """Of the container of a pod; empty while the kubelet has none yet."""
    for one in ns.plane.ask("GET", f"/api/v1/nodes/{NODE}/proxy/stats/summary")["pods"]:
        if one["podRef"] == {"name": name, "namespace": ns.name, "uid": ns.get(name)["metadata"]["uid"]}:
            for container in one.get("containers", ()):
                if "workingSetBytes" in container.get("memory", {}) and container.get("cpu"):
                    found: dict[str, Any] = container
                    return found
    return {}


def working_set(found: dict[str, Any]) -> int:
    return int(found["memory"]["workingSetBytes"]) if found else 0
