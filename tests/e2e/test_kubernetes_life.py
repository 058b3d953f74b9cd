"""The lives of pods in VMs on a real kubelet: jobs, ends, evictions; a VM dies; kubelet, containerd and API server are
started again.
"""

import json
import os
import signal

import pytest

from kit.control_plane import ApiError, version
from kit.kata import wait_for
from kit.kubernetes import Kubernetes, Namespace, deployment, needs_kubelet, pod

pytestmark = [needs_kubelet, pytest.mark.timeout(1800)]

SLEEP = ("sleep", "infinity")


def job(name: str, script: str, **spec: object) -> dict[str, object]:
    template = {"spec": pod(name, "sh", "-c", script, restartPolicy="Never")["spec"]}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": {"template": template, **spec}}


def test_jobs(ns: Namespace) -> None:
    ns.apply(job("good", "echo done", completions=3, parallelism=2), job("bad", "echo no; exit 3", backoffLimit=0))
    ns.wait("condition=Complete", "job/good")
    ns.wait("condition=Failed", "job/bad")
    assert ns.logs("job/bad") == "no\n"
    assert [ns.logs(one["metadata"]["name"]) for one in ns.pods(**{"job-name": "good"})] == ["done\n"] * 3


def test_a_cron_job(ns: Namespace) -> None:
    template = {"spec": job("tick", "echo tick")["spec"]}
    api = "batch/v1" if version("kube-apiserver") >= (1, 21) else "batch/v1beta1"
    spec = {"schedule": "* * * * *", "jobTemplate": template}
    ns.apply({"apiVersion": api, "kind": "CronJob", "metadata": {"name": "tick"}, "spec": spec})

    def ticked() -> list[str]:
        found = ns.plane.items(f"{ns.root}/pods")
        return [one["metadata"]["name"] for one in found if one["status"]["phase"] == "Succeeded"]

    (name, *_) = wait_for(ticked, "the job of a minute is done", 600, 1)
    assert ns.logs(name) == "tick\n"


def noting(path: str, script: str) -> dict[str, object]:
    """Options of a pod whose script has the directory of the node at /note."""
    mounts = [{"name": "note", "mountPath": "/note"}]
    volumes = [{"name": "note", "hostPath": {"path": path, "type": "DirectoryOrCreate"}}]
    return {"main": {"command": ["sh", "-c", script], "volumeMounts": mounts}, "volumes": volumes}


def test_deleted_softly_then_hard(ns: Namespace) -> None:
    """SIGTERM comes first; who goes on is killed when the period is over, and its preStop hook has been run."""
    path = f"{ns.cluster.node.data}/notes-{ns.name}"
    soft = noting(
        path, "trap 'echo soft >> /note/ends; exit 0' TERM; echo up >> /note/soft; while :; do sleep 0.1; done"
    )
    hard = noting(path, "trap 'echo hard >> /note/ends' TERM; echo up >> /note/hard; while :; do sleep 0.1; done")
    hook = {"preStop": {"exec": {"command": ["sh", "-c", "echo hook >> /note/ends"]}}}
    hard["main"] = {**hard["main"], "lifecycle": hook}  # type: ignore[dict-item]
    ns.apply(pod("soft", terminationGracePeriodSeconds=600, **soft))  # type: ignore[arg-type]
    ns.apply(pod("hard", terminationGracePeriodSeconds=5, **hard))  # type: ignore[arg-type]
    ns.wait_ready("soft", "hard")

    def noted(*files: str) -> list[str]:
        return ns.cluster.node.run("cat", *(f"{path}/{file}" for file in files)).stdout.split()

    wait_for(lambda: noted("soft", "hard") == ["up", "up"], "both are up")
    ns.kubectl("delete", "pod", "soft", "--wait=false")
    wait_for(lambda: noted("ends") == ["soft"], "one ends by itself")
    ns.kubectl("delete", "pod", "hard", "--wait=false")
    ns.wait_gone("soft")
    ns.wait_gone("hard")
    assert noted("ends") == ["soft", "hook", "hard"]


def test_eviction(ns: Namespace) -> None:
    """Not while a PodDisruptionBudget is against it."""
    policy = "policy/v1" if version("kube-apiserver") >= (1, 22) else "policy/v1beta1"
    budget = {"minAvailable": 1, "selector": {"matchLabels": {"app": "app"}}}
    ns.apply(
        {"apiVersion": policy, "kind": "PodDisruptionBudget", "metadata": {"name": "b"}, "spec": budget},
        deployment("app", 1, *SLEEP),
    )
    ns.wait("condition=Available", "deployment/app")
    (first,) = (one["metadata"]["name"] for one in ns.pods(app="app"))

    def evict() -> bool:
        body = {"apiVersion": policy, "kind": "Eviction", "metadata": {"name": first, "namespace": ns.name}}
        try:
            ns.plane.ask("POST", f"{ns.root}/pods/{first}/eviction", body)
        except ApiError as exc:
            if exc.code != 429:
                raise
            return False
        return True

    assert not evict()
    ns.kubectl("scale", "deployment/app", "--replicas=2")
    wait_for(evict, "it is evicted when there is another", period_s=0.5)
    ns.wait_gone(first)


def test_a_rollout(ns: Namespace) -> None:
    ns.apply(deployment("app", 2, *SLEEP))
    ns.wait("condition=Available", "deployment/app")
    before = {one["metadata"]["name"] for one in ns.pods(app="app")}
    ns.kubectl("set", "env", "deployment/app", "VERSION=2")
    ns.kubectl("rollout", "status", "deployment/app", "--timeout=240s", limit_s=300)
    after = {one["metadata"]["name"] for one in ns.pods(app="app") if "deletionTimestamp" not in one["metadata"]}
    assert len(after) == 2
    assert not before & after
    assert {ns.sh(name, "echo $VERSION") for name in after} == {"2\n"}


def identity(ns: Namespace, name: str) -> tuple[str, int, str]:
    """Of a container: what changes when it is started again, and since when its VM is up."""
    status = ns.status(name)
    return status["containerID"], status["restartCount"], ns.exec(name, "cat", "/proc/sys/kernel/random/boot_id")


def expect_alive(ns: Namespace, name: str, before: tuple[str, int, str]) -> None:
    assert identity(ns, name) == before
    assert ns.exec(name, "cat", "/tmp/mark") == "here\n"
    ns.start("after", *SLEEP)


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGKILL])
def test_the_kubelet_is_started_again(ns: Namespace, cluster: Kubernetes, by: signal.Signals) -> None:
    ns.start("one", *SLEEP)
    ns.sh("one", "echo here > /tmp/mark")
    before = identity(ns, "one")
    cluster.stop_kubelet(by)
    cluster.start_kubelet()
    wait_for(lambda: serves(ns), "the kubelet serves", period_s=0.5)
    expect_alive(ns, "one", before)


def serves(ns: Namespace) -> bool:
    return ns.plane.kubectl("-n", ns.name, "exec", "one", "--", "true", check=False).returncode == 0


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGKILL])
def test_containerd_is_started_again(ns: Namespace, cluster: Kubernetes, by: signal.Signals) -> None:
    ns.start("one", *SLEEP)
    ns.sh("one", "echo here > /tmp/mark")
    before = identity(ns, "one")
    first = cluster.node.engine_pid()
    cluster.host("kill", f"-{by.value}", str(first))
    wait_for(lambda: cluster.node.engine_pid() != first and cluster.node.engine_serves(), "containerd serves")
    wait_for(lambda: serves(ns), "exec works", period_s=0.5)
    expect_alive(ns, "one", before)


def test_the_api_server_is_started_again(ns: Namespace, cluster: Kubernetes) -> None:
    ns.start("one", *SLEEP)
    ns.sh("one", "echo here > /tmp/mark")
    before = identity(ns, "one")
    cluster.plane.stop_api()
    (sandbox,) = cluster.host("ls", "/run/vc/sbs").split()
    cluster.plane.start_api()
    wait_for(lambda: serves(ns), "exec works", period_s=0.5)
    expect_alive(ns, "one", before)
    assert sandbox in cluster.host("ls", "/run/vc/sbs").split()


def test_a_vm_that_is_killed_is_started_anew(ns: Namespace, cluster: Kubernetes) -> None:
    """By the kubelet, for the same pod; what it had in memory and on its own root is gone, and its volume is not."""
    mounts = [{"name": "kept", "mountPath": "/kept"}]
    ns.start("one", *SLEEP, main={"volumeMounts": mounts}, volumes=[{"name": "kept", "emptyDir": {}}])
    ns.sh("one", "echo here > /kept/mark; echo here > /tmp/mark")
    uid, (container, _, boot) = ns.get("one")["metadata"]["uid"], identity(ns, "one")
    (sandbox,) = cluster.host("ls", "/run/vc/sbs").split()
    os.kill(json.loads(cluster.host("cat", f"/run/vc/sbs/{sandbox}/persist.json"))["vmm_pid"], signal.SIGKILL)

    def again() -> bool:
        (status,) = ns.get("one")["status"]["containerStatuses"]
        return bool(status["ready"] and status["restartCount"] >= 1 and status["containerID"] != container)

    wait_for(again, "the container runs again", 600, 0.5)
    assert ns.get("one")["metadata"]["uid"] == uid
    assert ns.sh("one", "cat /kept/mark; test ! -e /tmp/mark; cat /proc/sys/kernel/random/boot_id").split()[0] == "here"
    assert identity(ns, "one")[2] != boot
    wait_for(lambda: sandbox not in cluster.host("ls", "/run/vc/sbs"), "the first VM's record goes", 600, 0.5)
