"""Verbs of docker's and podman's that are not here: what they are answered with. Imports nothing."""

__all__ = ["NOT_HERE"]

NOT_HERE = {
    "build": ("images are built by others", "buildah build, then kata-runtime image import oci-archive:FILE"),
    "buildx": ("images are built by others", "buildah build"),
    "login": ("registries' passwords are skopeo's", "skopeo login HOST"),
    "logout": ("registries' passwords are skopeo's", "skopeo logout HOST"),
    "push": (
        "images go to registries by others",
        "image save -o FILE, then skopeo copy docker-archive:FILE docker://...",
    ),
    "search": ("registries are not searched", "skopeo list-tags docker://HOST/NAME"),
    "manifest": ("manifests are made by others", "buildah manifest"),
    "compose": ("several containers are started by others", "podman-compose with podman --runtime kata"),
    "stack": ("several containers are started by others", "Kubernetes, with a RuntimeClass"),
    "service": ("there is no daemon", "a systemd unit with ExecStart=kata-runtime run ..."),
    "swarm": ("there is no daemon", "Kubernetes, with a RuntimeClass"),
    "node": ("there is no daemon", "Kubernetes: kata-runtime cluster status"),
    "secret": ("there is no store of secrets", "run -v FILE:/run/secrets/NAME:ro"),
    "context": ("commands are for this machine", "ssh HOST kata-runtime ..."),
    "plugin": ("there are no plugins", "CNI plugins: kata-runtime network ls"),
    "trust": ("signatures are skopeo's", "policy.json of containers-policy.json(5)"),
    "checkpoint": ("containers are not checkpointed", "templates start VMs fast: kata-runtime factory init"),
    "pod": ("pods are made by engines", "podman --runtime kata pod create, or Kubernetes"),
    "play": ("pods are made by engines", "podman --runtime kata play kube FILE"),
    "kube": ("pods are made by engines", "podman --runtime kata kube play FILE"),
    "generate": ("units are written by hand", "a systemd unit with ExecStart=kata-runtime run ..."),
    "healthcheck": ("nothing here runs health checks", "kata-runtime exec NAME COMMAND"),
    "mount": ("a container's files are on a disk of its VM", "kata-runtime cp NAME:PATH DIR, or run -v DIR:DST"),
    "unmount": ("a container's files are on a disk of its VM", "kata-runtime cp NAME:PATH DIR"),
    "machine": ("each container has a machine of its own", "kata-runtime run"),
    "quadlet": ("units are written by hand", "a systemd unit with ExecStart=kata-runtime run ..."),
}
"""Verb: (why, what does it)."""
