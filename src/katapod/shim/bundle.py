"""What a bundle and the annotations of its spec say about a container and, for the pause container, its sandbox."""

from katapod.model import oci
from katapod.model.annotations import ContainerKind, PodAnnotations
from katapod.model.errors import UsageError
from katapod.model.sizing import ContainerLimits

__all__ = ["dns_of", "image_of", "labels_of", "limits_of", "netns_of"]

RESOLV_CONF_MAX = 64 * 1024  # characters


def limits_of(spec: oci.Spec, about: PodAnnotations) -> ContainerLimits | None:
    """None for the pause container of a pod."""
    if about.kind is ContainerKind.SANDBOX:
        return None
    return ContainerLimits(memory_bytes=spec.memory_limit, cpus=spec.cpu_limit)


def netns_of(spec: oci.Spec) -> str | None:
    """The path of the network namespace; empty for a new one. Raises UsageError for the host's."""
    for namespace in spec.linux.namespaces:
        if namespace.type == "network":
            return namespace.path
    raise UsageError(
        "cannot use the host's network: a virtual machine has a network stack of its own",
        hint="leave out hostNetwork: true (ctr: --net-host), or run this pod with another RuntimeClass",
    )


def dns_of(spec: oci.Spec) -> tuple[str, ...]:
    """The lines of the pod's resolv.conf; none if it cannot be read: the containers get theirs as a mount."""
    sources = [mount.source for mount in spec.mounts if mount.destination == "/etc/resolv.conf" and mount.source]
    try:
        with open(sources[-1]) as handle:
            return tuple(line for line in handle.read(RESOLV_CONF_MAX).splitlines() if line and "\0" not in line)
    except (IndexError, OSError, ValueError):
        return ()


def labels_of(about: PodAnnotations, namespace: str) -> dict[str, str]:
    found = {
        "containerd.namespace": namespace,
        "io.kubernetes.pod.name": about.pod_name,
        "io.kubernetes.pod.namespace": about.pod_namespace,
        "io.kubernetes.pod.uid": about.pod_uid,
    }
    return {key: value for key, value in found.items() if value}


def image_of(spec: oci.Spec) -> str:
    keys = ("io.kubernetes.cri.image-name", "io.kubernetes.cri-o.ImageName")
    return next((spec.annotations[key] for key in keys if key in spec.annotations), "")
