"""The operator's process on a control plane of tests, and a cluster of three nodes for one test."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kit.control_plane import ApiError, ControlPlane, SimulatedKubelet, control_plane_running
from kit.kata import wait_for

__all__ = [
    "CLASSES",
    "CONFIGS",
    "JOBS",
    "LEASE",
    "LIMIT_S",
    "NODES",
    "TOP",
    "WEBHOOK",
    "Cluster",
    "cluster_of",
    "operating",
    "operator_plane",
    "sandboxed_pod",
    "start_operator",
]

TOP = Path(__file__).resolve().parents[2]
CONFIGS = "/apis/kataconfiguration.openshift.io/v1/kataconfigs"
CLASSES = "/apis/node.k8s.io/v1/runtimeclasses"
JOBS = "/apis/batch/v1/namespaces/katapod/jobs"
LEASE = "/apis/coordination.k8s.io/v1/namespaces/katapod/leases/katapod-operator"
WEBHOOK = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations/katapod-kataconfig"
NODES = ("node-a", "node-b", "node-c")
LIMIT_S = 180.0


@contextlib.contextmanager
def operator_plane(directory: Path) -> Iterator[ControlPlane]:
    """A control plane with the operator's manifests."""
    with control_plane_running(directory) as found:
        found.kubectl("apply", "-k", str(TOP / "packaging/operator"))
        found.ask("DELETE", WEBHOOK)  # no network here has the service's address: a test has one of its own
        condition = "--for=condition=Established"
        found.kubectl("wait", condition, "crd/kataconfigs.kataconfiguration.openshift.io", "--timeout=120s")
        yield found


class Cluster:
    """The control plane with three nodes, for one test."""

    def __init__(self, plane: ControlPlane) -> None:
        self.plane = plane
        self.outcomes: dict[str, bool | None] = {}  # by node: whether installing succeeds; None: it runs on
        self.removals: dict[str, bool | None] = {}  # the same of uninstalling
        self.messages: dict[str, str] = {}  # by node: what its job leaves in place of a report
        self.kubelet = SimulatedKubelet(plane, self._outcome)

    def _outcome(self, action: str, node: str) -> tuple[str, bool] | None:
        good = (self.removals if action == "uninstall" else self.outcomes).get(node, True)
        if good is None:
            return None
        if node in self.messages:
            return self.messages[node], good
        if action == "uninstall":
            return json.dumps({"action": action, "ok": True, "stage": "done"}), True
        report = {"action": action, "ok": good, "target": "0.1.0", "stage": "done" if good else "proof"}
        report |= (
            {"accelerator": "uml", "kernel": "6.1.0", "proofS": 1.25, "handlers": self._handlers(node)}
            if good
            else {"message": "no sandbox starts"}
        )
        return json.dumps(report), good

    def _handlers(self, node: str) -> list[str]:
        """That its last job was told of."""
        command = self.kubelet.commands[node]
        if "--settings" not in command:
            return ["kata"]
        return [one["name"] for one in json.loads(command[command.index("--settings") + 1])["handlers"]]

    def apply(self, name: str = "kata", **spec: Any) -> None:
        body = {"apiVersion": "kataconfiguration.openshift.io/v1", "kind": "KataConfig", "metadata": {"name": name}}
        self.plane.kubectl("apply", "-f", "-", text=json.dumps({**body, "spec": spec}))

    def status(self, name: str = "kata") -> dict[str, Any]:
        found: dict[str, Any] = self.plane.ask("GET", f"{CONFIGS}/{name}").get("status", {})
        return found

    def condition(self, kind: str, name: str = "kata") -> dict[str, Any]:
        return next((one for one in self.status(name).get("conditions", ()) if one["type"] == kind), {})

    def wait_condition(
        self, kind: str, status: str, reason: str = "", name: str = "kata", limit_s: float = LIMIT_S
    ) -> dict[str, Any]:
        def holds() -> dict[str, Any] | None:
            with contextlib.suppress(OSError):
                found = self.condition(kind, name)
                return found if found.get("status") == status and found["reason"].startswith(reason) else None
            return None

        found: dict[str, Any] = wait_for(holds, f"{kind} is {status} {reason}", limit_s)
        return found

    def is_gone(self, name: str = "kata") -> bool:
        with contextlib.suppress(OSError):
            return all(one["metadata"]["name"] != name for one in self.plane.items(CONFIGS))
        return False

    def remove(self, name: str = "kata") -> None:
        self.plane.ask("DELETE", f"{CONFIGS}/{name}")

    def nodes(self) -> dict[str, tuple[Any, Any]]:
        """Labels and annotations of each."""
        found = [one["metadata"] for one in self.plane.items("/api/v1/nodes")]
        return {one["name"]: (one.get("labels"), one.get("annotations")) for one in found}

    def left(self) -> list[str]:
        """Objects that only the operator makes."""
        jobs = [one["metadata"]["name"] for one in self.plane.items(JOBS)]
        return jobs + [one["metadata"]["name"] for one in self.plane.items(CLASSES)]


@contextlib.contextmanager
def cluster_of(plane: ControlPlane) -> Iterator[Cluster]:
    """With three nodes, and a simulated kubelet. What a test leaves is removed."""
    for name in NODES:
        plane.add_node(name)
    found = Cluster(plane)
    with found.kubelet:
        try:
            yield found
        finally:
            found.outcomes, found.removals, found.messages = {}, {}, {}
            forced = {"metadata": {"annotations": {"katapod.io/force-delete": "true"}, "finalizers": None}}
            for one in plane.items(CONFIGS):
                plane.merge(f"{CONFIGS}/{one['metadata']['name']}", forced)
                with contextlib.suppress(ApiError):
                    plane.ask("DELETE", f"{CONFIGS}/{one['metadata']['name']}")
            for path in ("/api/v1/nodes", CLASSES, JOBS):
                plane.ask("DELETE", path, {"propagationPolicy": "Background"})
            wait_for(lambda: not plane.items("/api/v1/namespaces/katapod/pods"), "pods of jobs have gone", LIMIT_S)


def start_operator(plane: ControlPlane, identity: str = "", *options: str) -> "subprocess.Popen[bytes]":
    """One with the same identity goes on where the other was killed; else it waits until that one's lease is over."""
    with (plane.directory / "operator.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "katapod.operator.cluster.main", *options],
            env={**os.environ, "KUBECONFIG": str(plane.operator), "KATAPOD_IDENTITY": identity},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


@contextlib.contextmanager
def operating(plane: ControlPlane, identity: str = "", *options: str) -> Iterator["subprocess.Popen[bytes]"]:
    process = start_operator(plane, identity, *options)
    try:
        yield process
        assert process.poll() is None, "the operator has ended by itself"
    finally:
        process.terminate()
        process.wait(LIMIT_S)


def sandboxed_pod(name: str, **spec: Any) -> dict[str, Any]:
    container = {"name": "c", "image": "busybox", "command": ["sleep", "infinity"]}
    wanted = {"runtimeClassName": "kata", "containers": [container], "automountServiceAccountToken": False, **spec}
    return {"metadata": {"name": name}, "spec": wanted}
