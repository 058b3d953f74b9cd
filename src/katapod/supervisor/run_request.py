"""What somebody asks for who wants a container: a value between flags or parameters and the supervisor."""

from pathlib import Path

from msgspec import Struct, field

from katapod.model.ids import ContainerId
from katapod.model.net_flags import NetworkRequest, PortRequest
from katapod.model.record import DEFAULT_STOP_TIMEOUT_S
from katapod.model.run_flags import STREAMS, LogChoice, RestartPolicy
from katapod.plan.container_spec import ContainerOptions

__all__ = ["ImagePolicy", "RunRequest"]


class ImagePolicy(Struct, frozen=True):
    """How an image is brought in. `pull`: missing, always or never; the others as images.Access has them."""

    pull: str = "missing"
    quiet: bool = False
    tls_verify: bool | None = None
    authfile: Path | None = None


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
    image_policy: ImagePolicy = field(default_factory=ImagePolicy)
    publish_all: bool = False  # the image's exposed ports, and `exposed`, each on any free port of the host
    exposed: tuple[PortRequest, ...] = ()
    cpus_allowed: frozenset[int] = frozenset()  # CPUs of the host for all of the VM; empty: those of who starts it
    cid_file: Path | None = None  # gets the container's id once it is created
    replace: bool = False  # a container of that name is removed first, whatever it does
    remove_image: bool = False  # with the container, unless somebody else uses it
    attach: tuple[str, ...] = STREAMS  # those that lead to the caller
    stop_timeout_s: int | None = DEFAULT_STOP_TIMEOUT_S
    log: LogChoice = field(default_factory=LogChoice)
    restart: RestartPolicy = field(default_factory=RestartPolicy)
    again: bool = False  # a container that is at rest on this host: it has its image and its files
    restarts: int = 0  # how often its policy has started it by then
    image_digest: str = ""  # of an image that is held already, which `image` is the name of

    @property
    def lasts(self) -> bool:
        """Whether it stays when it has ended, and can be started again."""
        return not self.remove and not self.joins

    @property
    def sandbox_id(self) -> ContainerId:
        return ContainerId(self.joins) if self.joins else self.container_id
