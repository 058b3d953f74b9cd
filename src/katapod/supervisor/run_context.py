"""What a process that holds a sandbox is given by whoever starts it, beside the request."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from katapod.host.state import StateStore
from katapod.images import ImageStore
from katapod.model.config import Config
from katapod.model.layout import Layout
from katapod.supervisor.run_request import RunRequest

__all__ = ["KeepRun", "RunContext"]


@dataclass(frozen=True, slots=True)
class RunContext:
    """`load_config` reads the configuration and changes it by a bundle's annotations, if there are any; it raises
    ConfigError. `image_progress` yields what hears of an image's way here (phase, bytes done, bytes in all), or None.
    `tell` hears a line for the user. `config_file`: as chosen by the user, else empty.
    """

    layout: Layout
    config_file: str
    load_config: Callable[[Mapping[str, str] | None], Config]
    image_progress: Callable[[], AbstractContextManager[Callable[[str, int, int | None], None] | None]]
    tell: Callable[[str], None]

    def states(self) -> StateStore:
        return StateStore(self.layout)

    def image_store(self) -> ImageStore:
        return ImageStore(self.layout.image_root)


KeepRun = Callable[[RunContext, RunRequest, bool], None]
"""Takes a run and whether it is detached, in place of doing it: a member of the pool."""
