"""What a node job leaves, and by what a node's VMs may run: for the node and for the cluster's side."""

from typing import Literal

import msgspec

from katapod.model.kataconfig import Accelerator

__all__ = ["ACCELERATORS", "Measured", "Report"]

ACCELERATORS: tuple[Accelerator, ...] = ("kvm", "uml", "tcg")


class Measured(msgspec.Struct, frozen=True, rename="camel"):
    """What a sandbox has taken beyond its containers' limits, rounded up, as `kata-runtime overhead` says it."""

    memory_mib: int
    cpu_millis: int


class Report(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """The outcome of a job on a node: written there as the container's termination message, kept in an annotation."""

    action: Literal["install", "uninstall"]
    ok: bool
    target: str = ""
    stage: str = ""  # where it ended
    message: str = ""
    accelerator: str = ""  # by which the proof's VM ran
    kernel: str = ""  # of the proof's VM
    proof_s: float = 0.0
    engine: str = ""  # name and version
    handlers: tuple[str, ...] = ()  # that the engine has now; none: HANDLER
    measured: dict[str, Measured] = {}  # by handler, of those that were to be measured
