"""Directories of the share at which another file system begins: mounted here once, before containers get them.

virtio-fs mounts them automatically when a path is resolved; but each mount namespace that triggers this gets a file
system of its own, with its own locks and pages, and with the flags of the parent mount. A copy of a mount made here has
neither problem.
"""

from __future__ import annotations

import errno
import os

from katapod.agent import log
from katapod.kernel.mount import MNT_DETACH, umount

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["Automounts"]


class Automounts:
    """Each is unmounted when its last user has gone."""

    def __init__(self) -> None:
        self._users: dict[str, int] = {}

    def hold(self, paths: Iterable[str]) -> list[str]:
        """Returns those that exist, which the caller releases later; one may be hidden by another mount."""
        held = []
        for path in paths:
            try:
                # stat(2) is not enough
                os.close(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC))
            except OSError as exc:
                log.debug(f"cannot open {path}: {exc.strerror}")
                continue
            self._users[path] = self._users.get(path, 0) + 1
            held.append(path)
        return held

    def release(self, paths: Sequence[str]) -> None:
        for path in reversed(paths):
            left = self._users.pop(path) - 1
            if left:
                self._users[path] = left
                continue
            try:
                umount(path, MNT_DETACH)
            except OSError as exc:
                if exc.errno not in (errno.EINVAL, errno.ENOENT):  # not a mount, or gone
                    log.warning(f"cannot unmount {path}: {exc.strerror}")
