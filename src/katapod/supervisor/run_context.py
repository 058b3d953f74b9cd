"""What a process that holds a sandbox is given by whoever starts it, beside the request."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from msgspec import Struct

from katapod.host.state import StateStore
from katapod.images import ImageStore
from katapod.model.config import Config
from katapod.model.layout import Layout
from katapod.supervisor.run_request import RunRequest

if TYPE_CHECKING:
    from katapod.sandbox.opening import SandboxServer

__all__ = ["KeepRun", "RunContext"]


class RunContext(Struct, frozen=True):
    """`load_config` reads the configuration and changes it by a bundle's annotations, if there are any; it raises
    ConfigError. `image_progress` yields what hears of an image's way here (phase, bytes done, bytes in all), or None.
    `tell` hears a line for the user. `servers` are opened beside each sandbox. `config_file`: as chosen by the user,
    else empty.
    """

    layout: Layout
    config_file: str
    load_config: Callable[[Mapping[str, str] | None], Config]
    image_progress: Callable[[], AbstractContextManager[Callable[[str, int, int | None], None] | None]]
    tell: Callable[[str], None]
    servers: "tuple[SandboxServer, ...]"

    def states(self) -> StateStore:
        return StateStore(self.layout)

    def image_store(self) -> ImageStore:
        return ImageStore(self.layout.image_root)


KeepRun = Callable[[RunContext, RunRequest, bool], None]
"""Takes a run and whether it is detached, in place of doing it: a member of the pool."""
