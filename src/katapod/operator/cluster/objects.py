"""Objects that the operator makes, as the API server takes them, and the changes that it asks for. Pure."""

import hashlib
from typing import Any

import msgspec

from katapod.model.kataconfig import RuntimeClassSpec
from katapod.operator.cluster.views import Record
from katapod.operator.names import (
    ACCELERATOR_LABEL,
    ACTION,
    CLOSED,
    HANDLER,
    MANAGED_BY,
    MANAGER,
    NODE_NAME,
    READY,
    READY_LABEL,
    RECORD,
    TARGET,
)

__all__ = ["JOB_LIMIT_S", "Settings", "class_selector", "node_change", "node_job", "runtime_class"]

JOB_LIMIT_S = 3600  # a payload of 600 MB, a guest's boot and a proof under emulation, on a slow disk
Body = dict[str, Any]


class Settings(msgspec.Struct, frozen=True):
    """How this operator has been deployed."""

    namespace: str
    image: str  # of node jobs
    target: str  # what nodes are to have
    monitor_image: str = ""  # of kata-monitor, on OpenShift; empty: none
    extension: str = ""  # of CoreOS, with the runtime; empty: by the nodes' OS
    os_image: str = ""  # of nodes of OpenShift, with the runtime in it, in place of an extension


def job_name(action: str, node_uid: str) -> str:
    """The same for all operators, so that no node has two jobs."""
    return f"katapod-{action}-{hashlib.sha256(node_uid.encode()).hexdigest()[:12]}"


def node_job(settings: Settings, action: str, node: str, node_uid: str, accelerators: tuple[str, ...]) -> Body:
    """A job that runs kata-node on a node, with no access to the cluster.

    It is bound by the node's name (matchFields), as a DaemonSet's pods are, and stays where others are driven away.
    """
    command = ["kata-node", action, "--root", "/host", "--report", "/dev/termination-log"]
    if action == "install":
        command += ["--target", settings.target, "--accelerators", ",".join(accelerators)]
    term = {"matchFields": [{"key": "metadata.name", "operator": "In", "values": [node]}]}
    labels = {MANAGED_BY: MANAGER, "app.kubernetes.io/name": "kata-node"}
    container = {
        "name": "kata-node",
        "image": settings.image,
        "imagePullPolicy": "IfNotPresent",
        "command": command,
        "securityContext": {"privileged": True},
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [{"name": "host", "mountPath": "/host"}],
    }
    pod = {
        "restartPolicy": "Never",
        "serviceAccountName": "katapod-node",
        "automountServiceAccountToken": False,
        "hostPID": True,
        "hostNetwork": True,
        "priorityClassName": "system-node-critical",
        "tolerations": [{"operator": "Exists"}],
        "affinity": {
            "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}},
        },
        "containers": [container],
        "volumes": [{"name": "host", "hostPath": {"path": "/"}}],
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": job_name(action, node_uid),
            "namespace": settings.namespace,
            "labels": labels,
            "annotations": {NODE_NAME: node, ACTION: action, TARGET: settings.target if action == "install" else ""},
        },
        "spec": {
            "backoffLimit": 0,
            "activeDeadlineSeconds": JOB_LIMIT_S,
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }


def class_selector(spec: RuntimeClassSpec, *, closed: bool) -> dict[str, str]:
    chosen = {READY_LABEL: CLOSED if closed else READY}
    return chosen | ({ACCELERATOR_LABEL: spec.accelerator} if spec.accelerator else {})


def runtime_class(spec: RuntimeClassSpec, *, closed: bool = False) -> Body:
    return {
        "apiVersion": "node.k8s.io/v1",
        "kind": "RuntimeClass",
        "metadata": {"name": spec.name, "labels": {MANAGED_BY: MANAGER}},
        "handler": HANDLER,
        "overhead": {"podFixed": msgspec.to_builtins(spec.overhead)},
        "scheduling": {"nodeSelector": class_selector(spec, closed=closed)},
    }


def node_change(record: Record | None, *, ready: bool, accelerator: str = "") -> Body:
    """A merge patch: what it sets to None is removed."""
    text = msgspec.json.encode(record).decode() if record is not None else None
    labels = {READY_LABEL: READY if ready else None, ACCELERATOR_LABEL: (accelerator or None) if ready else None}
    return {"metadata": {"annotations": {RECORD: text}, "labels": labels}}
