"""What `run` asks for: a value between its flags and the process that owns the sandbox."""

from dataclasses import dataclass, field
from pathlib import Path

from katapod.model.ids import ContainerId
from katapod.model.net_flags import NetworkRequest
from katapod.plan.container_spec import ContainerOptions

__all__ = ["RunRequest"]


@dataclass(frozen=True, slots=True)
class RunRequest:
    """`run`, parsed. Exactly one of image, rootfs and bundle is set."""

    container_id: ContainerId
    image: str
    rootfs: Path | None
    bundle: Path | None
    options: ContainerOptions
    remove: bool
    interactive: bool
    accel: str
    labels: dict[str, str]
    stop_signal: int | None
    network: NetworkRequest = field(default_factory=NetworkRequest)
