"""Directories of the share where another file system begins: mounted here, once, before containers take them over.

virtio-fs mounts them by itself, when a path is walked into; but each mount namespace that does so on its own gets a
file system of its own, with locks and pages of its own, and the flags of the mount above. A copy of the mount that is
here has neither trouble.
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
    """Each is unmounted with its last user."""

    def __init__(self) -> None:
        self._users: dict[str, int] = {}

    def hold(self, paths: Iterable[str]) -> list[str]:
        """Returns those that are there, which the caller releases later: another mount may hide one."""
        held = []
        for path in paths:
            try:
                # stat(2) would not do
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
                if exc.errno not in (errno.EINVAL, errno.ENOENT):  # it is no mount, or has gone
                    log.warning(f"cannot unmount {path}: {exc.strerror}")
