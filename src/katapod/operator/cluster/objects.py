"""Objects that the operator makes, as the API server takes them, and the changes that it asks for. Pure."""

import hashlib
from typing import Any

import msgspec

from katapod.model.kataconfig import RuntimeClassSpec
from katapod.operator.cluster.profiles import handler_of, wanted_target
from katapod.operator.cluster.views import ClassView, NodeView, Record
from katapod.operator.handlers import NodeSettings, default_settings
from katapod.operator.names import (
    ACCELERATOR_LABEL,
    ACTION,
    CLOSED,
    HANDLER,
    HANDLER_LABEL,
    MANAGED_BY,
    MANAGER,
    NODE_NAME,
    READY,
    READY_LABEL,
    RECORD,
    TARGET,
)

__all__ = ["JOB_LIMIT_S", "Settings", "class_selector", "closed_class", "node_change", "node_job", "runtime_class"]

JOB_LIMIT_S = 3600  # a payload of 600 MB, a guest's boot and a proof under emulation, on a slow disk
JOB_REQUESTS = {"cpu": "100m", "memory": "64Mi"}
"""Of a node job: without requests it gets what pods with requests leave, which on a busy node is next to nothing. An
installation has 55 MiB beside the files that it copies, which the page cache may forget, and takes 25 s of CPU time.
Not more is asked for: whatever does not fit drives a pod away."""
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


def node_job(
    settings: Settings, action: str, node: NodeView, accelerators: tuple[str, ...], wanted: NodeSettings
) -> Body:
    """A job that runs kata-node on a node, with no access to the cluster.

    It is bound by the node's name (matchFields), as a DaemonSet's pods are, and stays where others are driven away.
    """
    command = ["kata-node", action, "--root", "/host", "--report", "/dev/termination-log"]
    if action == "install":
        command += ["--target", settings.target, "--accelerators", ",".join(accelerators)]
        if wanted != default_settings():
            command += ["--settings", msgspec.json.encode(wanted).decode()]
    term = {"matchFields": [{"key": "metadata.name", "operator": "In", "values": [node.name]}]}
    labels = {MANAGED_BY: MANAGER, "app.kubernetes.io/name": "kata-node"}
    container = {
        "name": "kata-node",
        "image": settings.image,
        "imagePullPolicy": "IfNotPresent",
        "command": command,
        "resources": {"requests": JOB_REQUESTS},
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
            "name": job_name(action, node.uid),
            "namespace": settings.namespace,
            "labels": labels,
            "annotations": {
                NODE_NAME: node.name,
                ACTION: action,
                TARGET: wanted_target(settings.target, wanted) if action == "install" else "",
            },
        },
        "spec": {
            "backoffLimit": 0,
            "activeDeadlineSeconds": JOB_LIMIT_S,
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }


def class_selector(spec: RuntimeClassSpec, *, closed: bool) -> dict[str, str]:
    """Nodes on which it has been proven, and that have its handler already."""
    chosen = {READY_LABEL: CLOSED if closed else READY}
    if (handler := handler_of(spec)) != HANDLER:
        chosen[f"{HANDLER_LABEL}{handler}"] = READY
    return chosen | ({ACCELERATOR_LABEL: spec.accelerator} if spec.accelerator else {})


def closed_class(found: ClassView) -> Body:
    """One that is to go, as it is, for no new pod."""
    return _class_body(found.name, found.handler, found.overhead, {**found.selector, READY_LABEL: CLOSED})


def runtime_class(spec: RuntimeClassSpec, overhead: dict[str, str], *, closed: bool = False) -> Body:
    return _class_body(spec.name, handler_of(spec), overhead, class_selector(spec, closed=closed))


def _class_body(name: str, handler: str, overhead: dict[str, str], selector: dict[str, str]) -> Body:
    return {
        "apiVersion": "node.k8s.io/v1",
        "kind": "RuntimeClass",
        "metadata": {"name": name, "labels": {MANAGED_BY: MANAGER}},
        "handler": handler,
        "overhead": {"podFixed": overhead},
        "scheduling": {"nodeSelector": selector},
    }


def node_change(node: NodeView, record: Record | None, *, ready: bool, cordon: bool | None = None) -> Body:
    """A merge patch: what it sets to None is removed. `cordon`: None leaves it as it is."""
    proof = record.proof if record is not None else None
    labels: dict[str, str | None] = {name: None for name in node.labels if name.startswith(HANDLER_LABEL)}
    labels |= {READY_LABEL: None, ACCELERATOR_LABEL: None}
    if ready:
        labels |= {READY_LABEL: READY, ACCELERATOR_LABEL: (proof.accelerator if proof is not None else "") or None}
        handlers = proof.handlers if proof is not None else ()
        labels |= {f"{HANDLER_LABEL}{name}": READY for name in handlers if name != HANDLER}
    text = msgspec.json.encode(record).decode() if record is not None else None
    spec = {} if cordon is None else {"spec": {"unschedulable": True if cordon else None}}
    return {"metadata": {"annotations": {RECORD: text}, "labels": labels}, **spec}
