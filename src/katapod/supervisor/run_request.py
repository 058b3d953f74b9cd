"""What somebody asks for who wants a container: a value between flags or parameters and the supervisor."""

from pathlib import Path

from msgspec import Struct, field

from katapod.model.ids import ContainerId
from katapod.model.net_flags import NetworkRequest
from katapod.plan.container_spec import ContainerOptions

__all__ = ["RunRequest"]


class RunRequest(Struct, frozen=True):
    """One container. Exactly one of image, rootfs and bundle is set. `joins`: the id of a sandbox that is open; empty:
    the container gets one of its own, which has its id."""

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
    joins: str = ""

    @property
    def sandbox_id(self) -> ContainerId:
        return ContainerId(self.joins) if self.joins else self.container_id
