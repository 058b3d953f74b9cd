"""kill -9 of each process that a task of containerd depends on: told of truthfully and soon, removable, nothing left.

A container of ctr and a pod of the CRI run side by side, both writing. What is done to one must not touch the other.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from faults import die_hard, virtiofsd_of, vmm_of, wait_nothing_left

from kit.containerd import K8S, Containerd
from kit.cri import RUNNING, Cri, CriError, Pod
from kit.kata import Kata, wait_for
from kit.leaks import claim
from kit.oci_archive import BUSYBOX

REPORT_S = 180.0
HANG_LIMIT_S = 180.0  # for each call to a guest that stands still
READY, NOT_READY, EXITED = 0, 1, 2
BEATS = "while :; do echo beat; sleep 0.5; done"  # each is a process: a guest that is waited for is all but idle
TASKS = "state/io.containerd.runtime.v2.task"
CRASH = ("sh", "-c", "echo c > /proc/sysrq-trigger")
"""The guest's kernel stops, and its agent with it: from inside nobody can kill the agent, which is the init process."""


@pytest.fixture(autouse=True)
def _only_kata(handler: str) -> None:
    if handler != "kata":
        pytest.skip("the processes of a virtual machine")


def refused_by_ctr(ctr: Containerd, *args: str, namespace: str | None = None) -> str:
    """What ctr says of a call that has to fail, in time."""
    result = ctr(*args, namespace=namespace, timeout=HANG_LIMIT_S)
    assert result.code != 0, result
    return result.stderr


def refused_by_cri(pod: Pod, method: str, **fields: object) -> str:
    """What the CRI says of a call that has to fail, in time."""
    with pytest.raises(CriError) as caught:
        pod.cri(method, limit_s=HANG_LIMIT_S, **fields)
    return caught.value.details


@dataclass(frozen=True, slots=True)
class Pair:
    """`task`: of ctr, whose output goes to `log`. `pod` with `workload`. Both are writing."""

    ctr: Containerd
    task: str
    log: Path
    pod: Pod
    workload: str

    def shim_of(self, namespace: str, container: str) -> int:
        return int((self.ctr.run_dir / TASKS / namespace / container / "shim.pid").read_text())

    def wait_beats(self) -> None:
        """Both write on."""
        pod_log = Path(self.pod.container(self.workload).log_path)
        before = self.log.stat().st_size, pod_log.stat().st_size
        wait_for(lambda: self.log.stat().st_size > before[0] and pod_log.stat().st_size > before[1], "both write on")


@pytest.fixture
def pair(ctr: Containerd, cri: Cri, runtime: str, tmp_path: Path) -> Pair:
    task, log = ctr.new_id(), tmp_path / "log"
    flags = ("--detach", "--privileged", "--runtime", runtime, "--log-uri", f"file://{log}")
    ctr.ok("run", *flags, BUSYBOX, task, "sh", "-c", BEATS)
    pod = cri.run_pod(security={"privileged": True})
    workload = pod.start("sh", "-c", BEATS, linux={"security_context": {"privileged": True}})
    for namespace, container in ((ctr.namespace, task), (K8S, pod.id)):
        address = ctr.run_dir / TASKS / namespace / container / "address"
        claim(os.path.basename(address.read_text()))  # its socket, whose name does not tell whose it is
    found = Pair(ctr, task, log, pod, workload)
    found.wait_beats()
    return found


def end_by(pair: Pair, victim: str, namespace: str, container: str, workload: str) -> object:
    """Have `victim` of this sandbox die."""
    match victim:
        case "shim":
            return die_hard(pair.shim_of(namespace, container))
        case "vmm":
            return die_hard(vmm_of(container))
        case "virtiofsd":
            return die_hard(virtiofsd_of(container)[-1])
    command = pair.ctr.command("tasks", "exec", "--exec-id", "crash", workload, *CRASH, namespace=namespace)
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=180, check=False)


@pytest.mark.core
def test_death_of_the_shim(pair: Pair) -> None:
    expect_ends_by(pair, "shim")


@pytest.mark.parametrize("victim", ["vmm", "virtiofsd", "agent"])
def test_death_of_a_task(pair: Pair, victim: str) -> None:
    expect_ends_by(pair, victim)


def expect_ends_by(pair: Pair, victim: str) -> None:
    """The task ends and is told of, then the pod; nothing of them is left."""
    ctr, task, pod = pair.ctr, pair.task, pair.pod
    # a program whose files are gone with virtiofsd may die of SIGBUS before its machine ends
    ends = {137, 135} if victim == "virtiofsd" else {137}
    with ctr.events() as events:
        end_by(pair, victim, ctr.namespace, task, task)
        told = wait_for(lambda: events.of("/tasks/exit", task), f"{victim}: the task's exit", REPORT_S)
        assert told[0]["exit_status"] in ends
    if victim == "shim":  # who would be asked is gone: containerd has removed the task itself
        wait_for(lambda: ctr.tasks() == {}, "the task is gone", REPORT_S)
    else:
        assert ctr.tasks() == {task: "STOPPED"}
        assert ctr.delete(task) == told[0]["exit_status"]
    wait_nothing_left(task)
    ctr.ok("containers", "delete", task)
    assert pod.status().state == READY
    assert pod.exec(pair.workload, "echo", "well") == (0, "well\n", "")

    end_by(pair, victim, K8S, pod.id, pair.workload)
    wait_for(lambda: pod.container(pair.workload).state == EXITED, f"{victim}: the workload's exit", REPORT_S)
    unknown = 255  # what containerd's CRI says itself when its call to a shim breaks off
    assert pod.container(pair.workload).exit_code in ({137, unknown} if victim == "shim" else ends)
    wait_for(lambda: pod.status().state == NOT_READY, f"{victim}: the pod is not ready", REPORT_S)
    sandbox = pod.id
    pod.stop_and_remove()
    wait_nothing_left(sandbox)


def test_containerd_killed(pair: Pair) -> None:
    pair.ctr.stop(signal.SIGKILL)
    pair.ctr.start()
    pair.pod.cri.wait_serves()
    wait_for(lambda: pair.ctr.tasks() == {pair.task: "RUNNING"}, "the task is known again")
    wait_for(lambda: pair.pod.container(pair.workload).state == RUNNING, "the workload is known again")
    pair.wait_beats()
    assert pair.pod.status().state == READY


def test_guest_that_stands_still(pair: Pair) -> None:
    """Every call ends, says why, and all can be removed."""
    ctr, task, pod, workload = pair.ctr, pair.task, pair.pod, pair.workload
    for sandbox in (task, pod.id):
        os.kill(vmm_of(sandbox), signal.SIGSTOP)
    assert ctr.tasks() == {task: "RUNNING"}
    assert pod.container(workload).state == RUNNING

    ctr_says, cri_says = partial(refused_by_ctr, ctr), partial(refused_by_cri, pod)
    calls: dict[str, Callable[[], str]] = {
        "exec": lambda: ctr_says("tasks", "exec", "--exec-id", "e1", task, "true"),
        "pause": lambda: ctr_says("tasks", "pause", task),
        "metrics": lambda: ctr_says("tasks", "metrics", task),
        "kill": lambda: ctr_says("tasks", "kill", "--signal", "SIGUSR1", task),
        "ExecSync": lambda: cri_says("ExecSync", container_id=workload, cmd=["true"]),
        "ContainerStats": lambda: cri_says("ContainerStats", container_id=workload),
    }
    began = time.monotonic()
    with ThreadPoolExecutor(len(calls)) as threads:
        said = {name: threads.submit(call) for name, call in calls.items()}
    print(f"all ended after {time.monotonic() - began:.1f} s: { {name: one.result() for name, one in said.items()} }")
    for name, one in said.items():  # what a shim says of metrics, containerd keeps to its log
        assert ("metrics" if name in ("metrics", "ContainerStats") else "did not answer") in one.result(), name
    assert "Stats failed: sandbox" in ctr.log.read_text()
    wait_for(lambda: ctr.tasks() == {task: "STOPPED"}, "the task is given up")
    assert ctr.delete(task) == 137
    assert pod.wait_exit(workload) == 137
    sandbox = pod.id
    pod.stop_and_remove()
    wait_nothing_left(task, sandbox)


@pytest.fixture
def console_pod(node: Containerd) -> Iterator[Pod]:
    """A pod in whose VM the debug console gives us a shell."""
    node.forget()
    found = Cri(node, "kata-console")
    try:
        yield found.run_pod()
        found.remove_all()
    finally:
        found.close()


def test_agent_that_hangs_alone(console_pod: Pod, kata: Kata) -> None:
    """The guest's kernel and its containers go on. Every call ends and says why; then the pod is given up."""
    pod, ctr, workload = console_pod, console_pod.cri.node, console_pod.start("sh", "-c", BEATS)
    claim(os.path.basename((ctr.run_dir / TASKS / K8S / pod.id / "address").read_text()))
    sandbox, ice = pod.id, "/sys/fs/cgroup/ice"  # PID 1 takes no SIGSTOP, but a cgroup that is frozen takes it
    freeze = f"mkdir {ice} && echo 1 >{ice}/cgroup.procs && echo 1 >{ice}/cgroup.freeze; cat {ice}/cgroup.events"
    frozen = f"until grep -q 'frozen 1' {ice}/cgroup.events; do sleep 0.1; done"
    kata.ok("exec", "--vm", sandbox, "sh", "-c", f"{freeze}; {frozen}")
    began = time.monotonic()
    assert pod.status().state == READY
    assert pod.container(workload).state == RUNNING

    ctr_says = partial(refused_by_ctr, ctr, "tasks", namespace=K8S)
    cri_says = partial(refused_by_cri, pod)

    def start_another() -> str:
        with pytest.raises(CriError) as caught:
            pod.start("true", name="late")
        return caught.value.details

    calls: dict[str, Callable[[], str]] = {
        "exec": lambda: ctr_says("exec", "--exec-id", "e1", workload, "true"),
        "pause": lambda: ctr_says("pause", workload),
        "kill": lambda: ctr_says("kill", "--signal", "SIGUSR1", workload),
        "metrics": lambda: ctr_says("metrics", workload),
        "ExecSync": lambda: cri_says("ExecSync", container_id=workload, cmd=["true"]),
        "update": lambda: cri_says("UpdateContainerResources", container_id=workload, linux={"cpu_shares": 512}),
        "create": start_another,
        "kata-runtime": lambda: kata("exec", workload, "true", timeout=HANG_LIMIT_S).stderr,
    }
    with ThreadPoolExecutor(len(calls)) as threads:
        said = {name: one.result() for name, one in {n: threads.submit(call) for n, call in calls.items()}.items()}
    print(f"all ended after {time.monotonic() - began:.1f} s: {said}")
    for name, text in said.items():  # what a shim says of metrics, containerd keeps to its log
        assert ("metrics" if name == "metrics" else "did not answer") in text, name
    assert pod.wait_exit(workload) == 137
    wait_for(lambda: pod.status().state == NOT_READY, "the pod is not ready", REPORT_S)
    assert f"sandbox {sandbox} has died: sandbox {sandbox} hangs: its agent did not answer" in ctr.log.read_text()
    pod.stop_and_remove()
    wait_nothing_left(sandbox)
