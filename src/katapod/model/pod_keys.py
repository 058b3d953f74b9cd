"""How engines mark pods in the annotations of an OCI spec. Imports nothing: the start of a shim waits for it.

Source: pkg/cri/annotations of containerd, pkg/annotations of CRI-O.
"""

__all__ = ["CONTAINER", "KINDS"]

CONTAINER = "container"
"""The value of a kind for a workload of a pod, with every engine."""

KINDS = (
    ("io.kubernetes.cri.container-type", "sandbox", "io.kubernetes.cri.sandbox-id"),
    ("io.kubernetes.cri-o.ContainerType", "sandbox", "io.kubernetes.cri-o.SandboxID"),
    ("io.kubernetes.docker.type", "podsandbox", "io.kubernetes.sandbox.id"),
)
"""containerd, CRI-O, dockershim, in the order in which they are looked for: key of the kind, its value for a pause
container, key of the pod's id."""
