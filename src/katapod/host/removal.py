"""Removal of a sandbox's directories: what cannot be removed is set aside.

What is set aside has a name that is nobody's, so that it is in nobody's way; every later start tries to remove it. A
guest may have shaped all that is below: how katapod.kernel.trees copes with that is its own business.
"""

import contextlib
import logging
import os
from pathlib import Path

from katapod.host.mounts import unmount_below
from katapod.kernel import trees
from katapod.model.errors import KatapodError
from katapod.model.layout import Layout
from katapod.model.tokens import random_hex

__all__ = ["NotRemoved", "clear_away", "remove_tree", "sweep_aside"]

log = logging.getLogger(__name__)


class NotRemoved(KatapodError):
    """A directory, or a part of it, is still there."""


def remove_tree(directory: Path, *, deadline: float | None = None) -> None:
    """Remove a directory of ours with all in it, after unmounting what is mounted there. Idempotent.

    Raises MountFailed, NotRemoved, also when time.monotonic() has passed `deadline` first.
    """
    unmount_below(directory)
    try:
        trees.remove_tree(os.fspath(directory), deadline=deadline)
    except TimeoutError as exc:
        raise NotRemoved(f"cannot remove all of {directory} yet: there is too much in it") from exc
    except OSError as exc:
        place = f", {exc.filename!r} in it" if exc.filename and exc.filename != os.fspath(directory) else ""
        raise NotRemoved(f"cannot remove {directory}{place}: {exc.strerror}") from exc


def clear_away(layout: Layout, directory: Path, *, deadline: float | None = None) -> None:
    """Make the path free: by remove_tree, or else by setting aside what cannot be removed now, which is told of.

    Idempotent. Raises MountFailed, NotRemoved if the path is not free then.
    """
    try:
        remove_tree(directory, deadline=deadline)
    except KatapodError as exc:
        root = next(root for root in layout.sandbox_roots if directory.is_relative_to(root))
        aside = root / f".{'.'.join(directory.relative_to(root).parts)}.{random_hex(4)}"
        try:
            os.rename(directory, aside)
        except OSError:
            raise exc from None
        log.log(_level(exc), "%s; it is set aside as %s, and the next start tries again", exc, aside)


def sweep_aside(layout: Layout, deadline: float) -> None:
    """Try once more to remove what was set aside. What fails again is logged. Raises nothing."""
    for root in layout.sandbox_roots:
        entries: list[str] = []
        with contextlib.suppress(OSError):
            entries = sorted(name for name in os.listdir(root) if name.startswith("."))
        for name in entries:
            try:
                remove_tree(root / name, deadline=deadline)
            except (OSError, KatapodError) as exc:
                log.log(_level(exc), "%s; the next start tries again", exc)


def _level(problem: Exception) -> int:
    """Nothing is wrong with what only takes longer."""
    return logging.INFO if isinstance(problem.__cause__, TimeoutError) else logging.WARNING
