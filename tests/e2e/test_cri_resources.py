"""Limits of a pod's containers, their change while it runs, and statistics."""

from typing import Any

import pytest

from kit.cri import Cri, Pod
from kit.kata import wait_for

MIB = 1 << 20
SLEEP = ("sleep", "100000")
BUSY = ("sh", "-c", "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done; exec sleep 100000")


def cgroup_value(pod: Pod, container: str, v1: str, v2: str) -> str:
    """A value of the container's own cgroup, seen from inside."""
    return pod.sh(container, f"cat /sys/fs/cgroup/{v1} 2>/dev/null || cat /sys/fs/cgroup/{v2}").strip()


def memory_limit(pod: Pod, container: str) -> int:
    return int(cgroup_value(pod, container, "memory/memory.limit_in_bytes", "memory.max"))


def cpu_quota(pod: Pod, container: str) -> int:
    """Microseconds per 100 ms."""
    return int(cgroup_value(pod, container, "cpu/cpu.cfs_quota_us", "cpu.max").split()[0])


@pytest.mark.reference
def test_statistics(cri: Cri) -> None:
    pod = cri.run_pod()
    container = pod.start(*BUSY, labels={"app": "busy"})

    def used() -> Any:
        stats = cri("ContainerStats", container_id=container).stats
        return stats.cpu.usage_core_nano_seconds.value > 0 and stats.memory.working_set_bytes.value > 0

    wait_for(used, "CPU time and memory of the container are counted")
    (listed,) = cri("ListContainerStats", filter={"label_selector": {"app": "busy"}}).stats
    assert listed.attributes.id == container
    assert listed.cpu.usage_core_nano_seconds.value > 0
    assert listed.memory.usage_bytes.value > 0
    wait_for(
        lambda: cri("ContainerStats", container_id=container).stats.writable_layer.used_bytes.value > 0,
        "the writable layer is measured",
    )


@pytest.mark.reference
def test_statistics_of_the_pod(cri: Cri) -> None:
    pod = cri.run_pod(labels={"app": "stats"})
    container = pod.start(*BUSY)

    # containerd reads these from the pod's cgroup: of a VM, only the vCPUs are in it unless sandbox_cgroup_only is set
    whole = cri.handler == "runc"

    def counted() -> Any:
        stats = cri("PodSandboxStats", pod_sandbox_id=pod.id).stats.linux
        return stats.cpu.usage_core_nano_seconds.value > 0 and (stats.memory.usage_bytes.value > 0 or not whole)

    wait_for(counted, "what the pod uses is counted")
    (stats,) = cri("ListPodSandboxStats", filter={"label_selector": {"app": "stats"}}).stats
    assert [one.attributes.id for one in stats.linux.containers] == [container]
    assert not whole or stats.linux.process.process_count.value > 0
    assert stats.linux.network.default_interface.name == "eth0"


@pytest.mark.qemu("several vCPUs")
@pytest.mark.reference
def test_limits_are_changed(cri: Cri) -> None:
    """Upwards and downwards, on a container that runs."""
    pod = cri.run_pod()
    limits = {"memory_limit_in_bytes": 64 * MIB, "cpu_period": 100_000, "cpu_quota": 50_000}
    container = pod.start(*SLEEP, linux={"resources": limits})
    assert (memory_limit(pod, container), cpu_quota(pod, container)) == (64 * MIB, 50_000)
    for memory, quota in ((256 * MIB, 150_000), (96 * MIB, 20_000)):
        changed = {"memory_limit_in_bytes": memory, "cpu_period": 100_000, "cpu_quota": quota}
        cri("UpdateContainerResources", container_id=container, linux=changed)
        assert (memory_limit(pod, container), cpu_quota(pod, container)) == (memory, quota)


@pytest.mark.qemu("memory that comes later")
@pytest.mark.reference
def test_container_out_of_memory(cri: Cri) -> None:
    """It alone is killed, and the CRI says why."""
    pod = cri.run_pod()
    beside = pod.start(*SLEEP, name="beside")
    limits = {"memory_limit_in_bytes": 64 * MIB}
    # not before the start is over: runc's shim watches for it only then
    command = "until test -e /tmp/go; do sleep 0.1; done; exec tail /dev/zero"
    container = pod.start("sh", "-c", command, linux={"resources": limits})
    pod.sh(container, "touch /tmp/go")
    assert pod.wait_exit(container) == 137
    wait_for(lambda: pod.container(container).reason == "OOMKilled", "the reason is told")
    assert pod.exec(beside, "echo", "well") == (0, "well\n", "")


@pytest.mark.qemu("memory that comes later")
def test_more_memory_is_of_use(cri: Cri) -> None:
    """What did not fit into the container before fits after its limit is raised."""
    pod = cri.run_pod()
    container = pod.start(*SLEEP, linux={"resources": {"memory_limit_in_bytes": 64 * MIB}})
    take = "dd if=/dev/zero of=/dev/null bs=160M count=1 2>&1"
    assert pod.exec(container, "sh", "-c", take).code != 0
    cri("UpdateContainerResources", container_id=container, linux={"memory_limit_in_bytes": 400 * MIB})
    assert pod.exec(container, "sh", "-c", take).code == 0
    # more than any node has: the VM gets what there is, in steps that a small guest can take, and the limit is kept
    cri("UpdateContainerResources", container_id=container, linux={"memory_limit_in_bytes": 100_000 << 30})
    assert memory_limit(pod, container) == 100_000 << 30
    assert pod.exec(container, "sh", "-c", take).code == 0
