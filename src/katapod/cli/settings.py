"""What every verb needs: the global flags, the configuration, the stores."""

import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from katapod.host.hints import hint_for
from katapod.model.errors import KatapodError
from katapod.model.plain import LINES, plain

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from katapod.host.state import StateStore
    from katapod.images import ImageStore
    from katapod.model.config import Config, ParsedConfig
    from katapod.model.layout import Layout
    from katapod.supervisor.exec_server import ReadExec
    from katapod.supervisor.run_context import KeepRun, RunContext

__all__ = ["Globals", "need_root", "print_error"]


@dataclass(slots=True)
class Globals:
    """The flags before the verb."""

    config_file: str = ""
    debug: bool = False
    keep_exec: "Callable[[Any], None] | None" = None  # takes how `exec` was called, in place of doing it
    keep_run: "KeepRun | None" = None  # takes what `run` is to do, in place of doing it: a member of the pool

    def set_up_logging(self) -> None:
        import logging

        from katapod.host.log_lines import log_to

        if self.debug:
            log_to(sys.stderr, logging.DEBUG, "%(relativeCreated)6d %(name)s: %(message)s")
        else:
            log_to(sys.stderr, logging.WARNING, "kata-runtime: %(levelname)s: %(message)s")

    @property
    def layout(self) -> "Layout":
        from katapod.model.layout import Layout

        return Layout()

    def parse_config(self) -> "ParsedConfig":
        """Read the configuration, and print what is wrong with it but does not stop us. Raises ConfigError."""
        from pathlib import Path

        from katapod.model.config import load_config

        parsed = load_config(Path(self.config_file) if self.config_file else None)
        for problem in parsed.problems:
            print(f"kata-runtime: {problem.severity}: {problem}", file=sys.stderr)
        return parsed

    def load_config(self, *, need_files: bool = True, annotations: "Mapping[str, str] | None" = None) -> "Config":
        """Read the configuration, change it as a bundle's annotations say, and print what goes on with less.

        Raises ConfigError; with `need_files` also if a file that a guest is made of is missing.
        """
        import logging

        from katapod.model.config import check_paths

        parsed = self.parse_config()
        if annotations:
            from katapod.model.config_annotations import annotated

            parsed = annotated(parsed, annotations, len(os.sched_getaffinity(0)))
        if parsed.config.runtime.enable_debug and not self.debug:
            logging.getLogger().setLevel(logging.DEBUG)
        return check_paths(parsed, os.path.exists) if need_files else parsed.config

    def states(self) -> "StateStore":
        from katapod.host.state import StateStore

        return StateStore(self.layout)

    def image_store(self) -> "ImageStore":
        from katapod.images import ImageStore

        return ImageStore(self.layout.image_root)

    def run_context(self, read_exec: "ReadExec | None" = None) -> "RunContext":
        """`read_exec`: for execs that others hand over; None: they do them themselves."""
        from functools import partial

        from katapod.cli.progress import image_progress
        from katapod.observe.management_server import management_server
        from katapod.supervisor.exec_server import exec_server
        from katapod.supervisor.run_context import RunContext

        return RunContext(
            layout=self.layout,
            config_file=self.config_file,
            load_config=lambda annotations: self.load_config(annotations=annotations),
            image_progress=image_progress,
            tell=lambda text: print(f"kata-runtime: {text}", file=sys.stderr),
            servers=(management_server, partial(exec_server, read=read_exec)) if read_exec else (management_server,),
        )


def need_root(verb: str) -> None:
    """Raises KatapodError for another user: mounts, tap devices and /run/vc are root's."""
    if os.geteuid() != 0:
        raise KatapodError(f"cannot {verb}: this needs root", hint=f"sudo kata-runtime {verb} ...")


def print_error(error: BaseException) -> None:
    """Say on standard error what failed and, where the error knows, what to do about it."""
    text, hint = str(error), getattr(error, "hint", "")
    if isinstance(error, OSError) and error.strerror:  # not as Python writes it: [Errno 13] ...
        names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        text, hint = ": ".join([*(names and [" -> ".join(names)]), error.strerror]), hint_for(error) if names else ""
    print(f"kata-runtime: {plain(text, keep=LINES)}", file=sys.stderr)
    if hint:
        print(f"  hint: {plain(hint, keep=LINES)}", file=sys.stderr)
