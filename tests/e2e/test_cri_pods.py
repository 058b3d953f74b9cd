"""The life of a pod through the CRI: sandbox, workloads, names, namespaces, end."""

import json
from pathlib import Path

import pytest

from kit.cri import RUNNING, Cri, CriError, Pod
from kit.jail_probe import assert_jailed
from kit.kata import RUN_PREFIX, wait_for
from kit.oci_archive import BUSYBOX

SLEEP = ("sleep", "100000")
READY, NOT_READY = 0, 1


@pytest.mark.core
@pytest.mark.smoke
@pytest.mark.reference
def test_pod_with_two_workloads(cri: Cri) -> None:
    pod = cri.run_pod(labels={"app": "two"})
    assert pod.status().state == READY
    first = pod.start("sh", "-c", "echo one; exec sleep 100000", name="first")
    second = pod.start("sh", "-c", "echo two; exec sleep 100000", name="second")
    assert [pod.container(one).state for one in (first, second)] == [RUNNING, RUNNING]
    assert pod.exec(first, "hostname").stdout == pod.exec(second, "hostname").stdout
    listed = cri("ListContainers", filter={"pod_sandbox_id": pod.id}).containers
    assert {one.id: one.metadata.name for one in listed} == {first: "first", second: "second"}
    found = cri("ListPodSandbox", filter={"label_selector": {"app": "two"}}).items
    assert [(one.id, one.runtime_handler) for one in found] == [(pod.id, cri.handler)]
    record = Path("/run/vc/sbs") / pod.id / "persist.json"
    if record.exists():  # not of the runtime that this one is compared with
        assert_jailed(json.loads(record.read_text())["vmm_pid"])

    cri("StopContainer", container_id=first, timeout=0)
    assert pod.container(first).exit_code == 137
    assert pod.container(second).state == RUNNING

    cri("StopPodSandbox", pod_sandbox_id=pod.id)
    assert pod.status().state == NOT_READY
    assert pod.wait_exit(second) == 137
    pod.stop_and_remove()
    with pytest.raises(CriError, match="NOT_FOUND"):
        cri("PodSandboxStatus", pod_sandbox_id=listed[0].pod_sandbox_id)
    assert list(cri("ListContainers", filter={"pod_sandbox_id": listed[0].pod_sandbox_id}).containers) == []


def test_the_runtime_says_it_is_ready(cri: Cri) -> None:
    assert cri("Version").runtime_name == "containerd"
    conditions = {one.type: one.status for one in cri("Status").status.conditions}
    assert conditions.items() >= {"RuntimeReady": True, "NetworkReady": True}.items()  # containerd 1.7 has one more
    assert cri("ImageStatus", image={"image": BUSYBOX}).image.size > 0


@pytest.mark.reference
def test_stop_is_soft_first(pod: Pod) -> None:
    container = pod.start("sh", "-c", "trap 'echo bye; exit 3' TERM; echo up; while :; do sleep 0.1; done")
    wait_for(lambda: pod.log_text(container) == ["up"], "it is up")
    pod.cri("StopContainer", container_id=container, timeout=60)
    assert pod.container(container).exit_code == 3
    assert pod.log_text(container) == ["up", "bye"]


def test_stop_is_hard_at_last(pod: Pod) -> None:
    container = pod.start("sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.1; done")
    wait_for(lambda: pod.log_text(container) == ["up"], "it is up")
    pod.cri("StopContainer", container_id=container, timeout=1)
    assert pod.container(container).exit_code == 137


@pytest.mark.reference
def test_container_is_restarted_in_its_pod(cri: Cri) -> None:
    """As the kubelet does after a crash: a new container with the next attempt, in the same sandbox."""
    pod = cri.run_pod()
    beside = pod.start(*SLEEP, name="beside")
    first = pod.start("sh", "-c", "exit 9")
    assert pod.wait_exit(first) == 9
    pod.remove_container(first)
    second = pod.start("sh", "-c", "echo again; exec sleep 100000")
    wait_for(lambda: pod.log_text(second) == ["again"], "the second attempt is up")
    assert pod.container(second).metadata.attempt == 2
    assert pod.container(beside).state == RUNNING


def test_init_containers_run_in_turn(pod: Pod) -> None:
    for number in range(3):
        assert pod.run_once("sh", "-c", f"echo init {number}", name=f"init{number}") == (0, f"init {number}\n")
    assert pod.exec(pod.start(*SLEEP), "true").code == 0


@pytest.mark.reference
def test_names_of_the_pod(cri: Cri) -> None:
    dns = {"servers": ["10.88.7.53"], "searches": ["tests.local", "local"], "options": ["ndots:5"]}
    pod = cri.run_pod(hostname="podhost", dns_config=dns)
    container = pod.start(*SLEEP)
    assert pod.exec(container, "hostname") == (0, "podhost\n", "")
    lines = pod.sh(container, "cat /etc/resolv.conf").splitlines()
    assert lines == ["search tests.local local", "nameserver 10.88.7.53", "options ndots:5"]


@pytest.mark.reference
@pytest.mark.parametrize("shared", [True, False])
def test_process_ids(cri: Cri, shared: bool) -> None:
    """shareProcessNamespace: the containers of a pod see each other's processes, or their own alone."""
    options = {"pid": 0 if shared else 1}
    security = {"namespace_options": options}
    pod = cri.run_pod(security=security)
    first = pod.start("sleep", "111111", name="first", linux={"security_context": security})
    second = pod.start("sleep", "222222", name="second", linux={"security_context": security})
    seen = pod.sh(second, "ps -o pid,args")
    assert ("sleep 111111" in seen) == shared
    pids = {command: pid for pid, command in (line.split(None, 1) for line in seen.splitlines())}
    assert (pids["sleep 222222"] == "1") != shared
    if shared:
        pod.sh(second, "kill -9 $(ps -o pid,args | grep '[s]leep 111111' | awk '{print $1}')")
        assert pod.wait_exit(first) == 137


def test_command_that_does_not_exist(pod: Pod) -> None:
    container = pod.create("/no/such/program")
    with pytest.raises(CriError, match="/no/such/program"):
        pod.cri("StartContainer", container_id=container)
    assert pod.container(container).exit_code != 0
    other = pod.start(*SLEEP, name="other")
    assert pod.exec(other, "echo", "well") == (0, "well\n", "")


def test_image_that_does_not_exist(pod: Pod) -> None:
    with pytest.raises(CriError, match="no-such-image"):
        pod.create(*SLEEP, image={"image": "docker.io/katapod-tests/no-such-image:1"})


def test_mount_of_what_does_not_exist(pod: Pod) -> None:
    """containerd makes a missing folder on the host; below a file it cannot."""
    with pytest.raises(CriError, match="/etc/hostname/below"):
        pod.start(*SLEEP, mounts=[{"host_path": "/etc/hostname/below", "container_path": "/mnt"}])
    assert pod.exec(pod.start(*SLEEP, name="other"), "true").code == 0


def test_unknown_runtime_handler(cri: Cri) -> None:
    with pytest.raises(CriError, match="no-such-handler"):
        cri(
            "RunPodSandbox",
            config={"metadata": {"name": f"{RUN_PREFIX}bad", "uid": "bad", "namespace": "tests"}},
            runtime_handler="no-such-handler",
        )


def test_stop_and_remove_can_be_repeated(cri: Cri) -> None:
    pod = cri.run_pod()
    container, sandbox = pod.start(*SLEEP), pod.id
    for _ in range(2):
        cri("StopContainer", container_id=container, timeout=0)
    for _ in range(2):
        cri("RemoveContainer", container_id=container)
    for _ in range(2):
        cri("StopPodSandbox", pod_sandbox_id=sandbox)
    pod.stop_and_remove()
    cri("RemovePodSandbox", pod_sandbox_id=sandbox)


@pytest.mark.reference
def test_restart_of_containerd(cri: Cri) -> None:
    """The pod is known afterwards, its workload serves, and it can be removed."""
    pod = cri.run_pod()
    container = pod.start("sh", "-c", "trap 'exit 4' TERM; while :; do sleep 0.1; done")
    cri.node.stop()
    cri.node.start()
    cri.wait_serves()
    assert pod.container(container).state == RUNNING
    assert pod.exec(container, "echo", "well") == (0, "well\n", "")
    cri("StopContainer", container_id=container, timeout=60)
    assert pod.container(container).exit_code == 4
