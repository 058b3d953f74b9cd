"""What an engine says about a container in the annotations of its OCI spec: of which pod it is, and how big that gets.

containerd's CRI plugin, CRI-O and the dockershim each have keys of their own, tried in that order.
Source: pkg/cri/annotations of containerd, pkg/annotations of CRI-O.
"""

from collections.abc import Mapping
from enum import Enum

from msgspec import Struct

from katapod.model.errors import SpecError, UsageError
from katapod.model.ids import parse_container_name
from katapod.model.pod_keys import CONTAINER, KINDS
from katapod.model.sizing import ContainerLimits

__all__ = ["ContainerKind", "PodAnnotations", "parse_annotations"]

CRI_MEMORY = "io.kubernetes.cri.sandbox-memory"
CRI_CPU_QUOTA = "io.kubernetes.cri.sandbox-cpu-quota"
CRI_CPU_PERIOD = "io.kubernetes.cri.sandbox-cpu-period"
CRI_CPU_SHARES = "io.kubernetes.cri.sandbox-cpu-shares"
USUAL_PERIOD_US = 100_000
SHARES_PER_CPU = 1024
MAX_VALUE = 2**63 - 1


class ContainerKind(Enum):
    SANDBOX = "sandbox"  # the pause container: its life is the pod's
    CONTAINER = "container"  # a workload of a pod
    SINGLE = "single"  # no pod: it is its own sandbox


class PodAnnotations(Struct, frozen=True, kw_only=True):
    kind: ContainerKind
    sandbox_id: str
    """Of the sandbox that it is or belongs to; checked, safe as part of a path."""
    pod_name: str = ""
    pod_namespace: str = ""
    pod_uid: str = ""
    container_name: str = ""
    pod_limits: ContainerLimits | None = None
    """Sum over the pod's containers, as the kubelet announces it with the sandbox; a part that is None stands for
    "no limit". None: nothing was announced."""
    pod_cpus_asked: int = 0
    """Where the pod has no CPU limit: whole CPUs that its requests come to; 0: none were announced."""


class _Engine(Struct, frozen=True):
    """The keys of one engine; empty: it has none."""

    kind: str
    sandbox: str
    sandbox_id: str
    pod_name: str = ""
    pod_namespace: str = ""
    pod_uid: str = ""
    container_name: str = ""


_ENGINES = (
    _Engine(
        *KINDS[0],
        "io.kubernetes.cri.sandbox-name",
        "io.kubernetes.cri.sandbox-namespace",
        "io.kubernetes.cri.sandbox-uid",
        "io.kubernetes.cri.container-name",
    ),
    _Engine(
        *KINDS[1],
        "io.kubernetes.cri-o.KubeName",
        "io.kubernetes.cri-o.Namespace",
        "io.kubernetes.pod.uid",
        "io.kubernetes.cri-o.ContainerName",
    ),
    _Engine(*KINDS[2]),
)


def parse_annotations(annotations: Mapping[str, str], container_id: str) -> PodAnnotations:
    """Read the annotations of the container `container_id`.

    Raises SpecError, which names key and value, for a kind that does not exist, a container without its pod's id,
    an id that is none, a size that is no number.
    """
    limits, cpus_asked = _pod_limits(annotations)
    for engine in _ENGINES:
        value = annotations.get(engine.kind)
        if value is None:
            continue
        if value == engine.sandbox:
            kind, sandbox_id = ContainerKind.SANDBOX, container_id
        elif value == CONTAINER:
            kind, sandbox_id = ContainerKind.CONTAINER, _sandbox_id(annotations, engine)
        else:
            raise SpecError(
                f"cannot use the annotation {engine.kind}={_shown(value)}: the kinds are {engine.sandbox} and container"
            )
        return PodAnnotations(
            kind=kind,
            sandbox_id=sandbox_id,
            pod_name=annotations.get(engine.pod_name, ""),
            pod_namespace=annotations.get(engine.pod_namespace, ""),
            pod_uid=annotations.get(engine.pod_uid, ""),
            container_name=annotations.get(engine.container_name, ""),
            pod_limits=limits,
            pod_cpus_asked=cpus_asked,
        )
    return PodAnnotations(
        kind=ContainerKind.SINGLE, sandbox_id=container_id, pod_limits=limits, pod_cpus_asked=cpus_asked
    )


def _sandbox_id(annotations: Mapping[str, str], engine: _Engine) -> str:
    value = annotations.get(engine.sandbox_id, "")
    if not value:
        raise SpecError(
            f"cannot tell the pod of a container: {engine.kind}=container, but {engine.sandbox_id} is absent"
        )
    try:
        return parse_container_name(value)
    except UsageError as exc:
        raise SpecError(f"cannot use the annotation {engine.sandbox_id}={_shown(value)}: {exc}") from exc


def _pod_limits(annotations: Mapping[str, str]) -> tuple[ContainerLimits | None, int]:
    """(what the pod's containers add up to, CPUs that they ask for). A quota of 0 or below is none, and then the
    shares say what was asked for; 2 shares are the kernel's least, which the kubelet writes where nothing was."""
    found = [_number(annotations, key) for key in (CRI_MEMORY, CRI_CPU_QUOTA, CRI_CPU_PERIOD, CRI_CPU_SHARES)]
    if all(value is None for value in found):
        return None, 0
    memory, quota, period, shares = (value or 0 for value in found)
    limits = ContainerLimits(
        memory_bytes=memory if memory > 0 else None,
        cpus=quota / (period if period > 0 else USUAL_PERIOD_US) if quota > 0 else None,
    )
    return limits, -(-shares // SHARES_PER_CPU) if quota <= 0 and shares > 2 else 0


def _number(annotations: Mapping[str, str], key: str) -> int | None:
    """A decimal number, perhaps below 0. int() alone takes underscores, blanks and other scripts' digits too."""
    text = annotations.get(key)
    if text is None:
        return None
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 19 and int(digits) <= MAX_VALUE):
        raise SpecError(f"cannot use the annotation {key}={_shown(text)}: it is not a decimal number of 64 bits")
    return int(text)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:80] + "...")
