"""Where the library finds its host: directories, configuration, stores."""

import contextlib
import logging
import os

from katapod.host.state import StateStore
from katapod.images import ImageStore
from katapod.model.errors import KatapodError
from katapod.model.layout import Layout
from katapod.observe.management_server import management_server
from katapod.sandbox.configuration import read_config
from katapod.supervisor.run_context import RunContext

__all__ = ["image_store", "need_root", "run_context", "states"]

log = logging.getLogger(__name__)


def states() -> StateStore:
    return StateStore(Layout())


def image_store() -> ImageStore:
    return ImageStore(Layout().image_root)


def run_context(config_file: str = "") -> RunContext:
    """What a supervisor is told by the command line, here by logging."""

    return RunContext(
        layout=Layout(),
        config_file=config_file,
        load_config=lambda annotations: read_config(config_file, annotations),
        image_progress=lambda: contextlib.nullcontext(None),
        tell=log.info,
        servers=(management_server,),
    )


def need_root(what: str) -> None:
    """Raises KatapodError for another user: mounts, tap devices and /run/vc are root's."""
    if os.geteuid() != 0:
        raise KatapodError(f"cannot {what}: this needs root", hint="run the program as root")
