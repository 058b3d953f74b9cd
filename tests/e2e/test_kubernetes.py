"""What users of kubectl do with pods in VMs, on a real kubelet."""

from pathlib import Path

import pytest

from kit.kubernetes import NODE, Namespace, deployment, needs_kubelet

pytestmark = [needs_kubelet, pytest.mark.timeout(1800)]

SLEEP = ("sleep", "infinity")


def test_a_deployment_becomes_available(ns: Namespace) -> None:
    ns.apply(deployment("app", 1, *SLEEP))
    ns.wait("condition=Available", "deployment/app")
    (found,) = ns.pods(app="app")
    name, address = found["metadata"]["name"], found["status"]["podIP"]
    kernel = ns.exec(name, "uname", "-r").strip()
    assert kernel != Path("/proc/sys/kernel/osrelease").read_text().strip()
    assert ns.exec(name, "hostname").strip() == name
    assert f"inet {address}/" in ns.exec(name, "ip", "address", "show", "dev", "eth0")
    processes = ns.exec(name, "ps", "-o", "args").splitlines()[1:]
    assert sorted(processes) == ["ps -o args", "sleep infinity"]
    assert found["spec"]["nodeName"] == NODE
    assert found["spec"]["overhead"], "the RuntimeClass counts"
