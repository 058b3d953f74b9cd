"""Objects that the back end makes, as the API server takes them. Pure."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from katapod.model.kataconfig import Requirement, RuntimeClassSpec, Selector
from katapod.operator.cluster.machine_config.names import (
    API_GROUP,
    CONTENT,
    EXTENSION_CONFIG,
    HELD,
    IMAGE_CONFIG,
    LOG_CONFIG,
    MONITOR,
    NODE_ROLE,
    POOL,
    POOL_LABEL,
    POOL_ROLE,
    ROLE,
    WORKER,
)
from katapod.operator.cluster.machine_config.views import MachineConfigView
from katapod.operator.cluster.objects import Settings, class_selector, runtime_class
from katapod.operator.cluster.profiles import overhead_of
from katapod.operator.cluster.views import NodeView
from katapod.operator.names import MANAGED_BY, MANAGER, READY, READY_LABEL

__all__ = [
    "POOL_CONFIGS",
    "POOL_NODES",
    "Content",
    "content_of",
    "log_config",
    "machine_config",
    "monitor",
    "pool",
    "pool_class",
]

Body = dict[str, Any]
IGNITION = "3.2.0"
MONITOR_PORT = 8090
MONITOR_REQUESTS = {"cpu": "10m", "memory": "60Mi"}

POOL_CONFIGS = Selector(match_expressions=(Requirement(ROLE, "In", (POOL, WORKER)),))
"""What our pool has: all that workers get, and what is for it alone."""
POOL_NODES = Selector(match_labels={POOL_ROLE: ""})


@dataclass(frozen=True, slots=True)
class Content:
    """By what nodes get the runtime: an extension of their OS, or an OS image that has it."""

    extension: str
    os_image: str = ""

    @property
    def name(self) -> str:
        """Of its MachineConfig."""
        return IMAGE_CONFIG if self.os_image else EXTENSION_CONFIG

    def __str__(self) -> str:
        return self.os_image or f"extension {self.extension}"

    def is_in(self, config: MachineConfigView) -> bool:
        """Whether nodes with this MachineConfig, ours or a rendered one, get it."""
        if self.os_image:
            return config.os_image == self.os_image
        return self.extension in config.extensions


def content_of(settings: Settings, nodes: Iterable[NodeView]) -> Content:
    """RHEL CoreOS has another extension than Fedora's and CentOS's, unless the operator was told which."""
    systems = [one.system for one in nodes if "CoreOS" in one.system]
    community = bool(systems) and not any(one.startswith("Red Hat") for one in systems)
    extension = settings.extension or ("kata-containers" if community else "sandboxed-containers")
    return Content(extension, settings.os_image)


def _object(kind: str, name: str, **labels: str) -> Body:
    return {
        "apiVersion": f"{API_GROUP}/v1",
        "kind": kind,
        "metadata": {"name": name, "labels": {MANAGED_BY: MANAGER, **labels}},
    }


def machine_config(content: Content, role: str, app: str) -> Body:
    wanted = {"osImageURL": content.os_image} if content.os_image else {"extensions": [content.extension]}
    spec = {"config": {"ignition": {"version": IGNITION}}, **wanted}
    return _object("MachineConfig", content.name, **{ROLE: role, "app": app}) | {"spec": spec}


def pool(max_unavailable: int, *, held: bool | None) -> Body:
    """`held`: whether we pause it; None leaves that to others."""
    body = _object("MachineConfigPool", POOL, **{POOL_LABEL + POOL: ""})
    body["spec"] = {
        "machineConfigSelector": {"matchExpressions": msgspec.to_builtins(POOL_CONFIGS.match_expressions)},
        "nodeSelector": {"matchLabels": POOL_NODES.match_labels},
        "maxUnavailable": max_unavailable,
    }
    if held is not None:
        body["spec"]["paused"] = held
        body["metadata"]["annotations"] = {HELD: "true" if held else None}
    return body


def log_config(level: str, pool: str) -> Body:
    spec = {
        "machineConfigPoolSelector": {"matchLabels": {POOL_LABEL + pool: ""}},
        "containerRuntimeConfig": {"logLevel": level},
    }
    return _object("ContainerRuntimeConfig", LOG_CONFIG) | {"spec": spec}


def pool_class(spec: RuntimeClassSpec, pool: str, *, closed: bool) -> Body:
    """A RuntimeClass that selects the pool's role as well, as upstream's."""
    body = runtime_class(spec, overhead_of(spec, ()), closed=closed)
    body["scheduling"]["nodeSelector"] = {NODE_ROLE + pool: "", **class_selector(spec, closed=closed)}
    return body


def monitor(settings: Settings) -> Body:
    """kata-monitor on the nodes that are done: earlier there is no SELinux policy for it, nor a sandbox to watch.

    It reads what only root can read, and is told by SELinux from the host; so it is root, without capabilities beyond
    those that reading takes, and with the type of containers that look after others.
    """
    name = {"app.kubernetes.io/name": "kata-monitor"}
    labels = {MANAGED_BY: MANAGER, **name}
    container = {
        "name": "kata-monitor",
        "image": settings.monitor_image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["kata-monitor", "-listen-address", f"0.0.0.0:{MONITOR_PORT}"],
        "ports": [{"name": "metrics", "containerPort": MONITOR_PORT}],
        "resources": {"requests": MONITOR_REQUESTS},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "runAsUser": 0,
            "seLinuxOptions": {"type": "spc_t"},
            "capabilities": {"drop": ["ALL"], "add": ["DAC_READ_SEARCH", "DAC_OVERRIDE", "SYS_PTRACE"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumeMounts": [
            {"name": "sandboxes", "mountPath": "/run/vc", "mountPropagation": "HostToContainer", "readOnly": True},
            {"name": "token", "mountPath": "/run/kata-monitor"},
        ],
    }
    pod = {
        "serviceAccountName": "monitor",
        "automountServiceAccountToken": False,
        "hostPID": True,
        "priorityClassName": "system-cluster-critical",
        "nodeSelector": {READY_LABEL: READY},
        "tolerations": [{"operator": "Exists"}],
        "containers": [container],
        "volumes": [
            {"name": "sandboxes", "hostPath": {"path": "/run/vc", "type": "DirectoryOrCreate"}},
            {"name": "token", "emptyDir": {"medium": "Memory"}},
        ],
    }
    spec = {
        "selector": {"matchLabels": name},
        "updateStrategy": {"type": "RollingUpdate"},
        "template": {"metadata": {"labels": labels}, "spec": pod},
    }
    digest = hashlib.sha256(msgspec.json.encode(spec, order="sorted")).hexdigest()[:16]
    return {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {
            "name": MONITOR,
            "namespace": settings.namespace,
            "labels": labels,
            "annotations": {CONTENT: digest},
        },
        "spec": spec,
    }
