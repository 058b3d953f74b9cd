"""Volumes in a sandbox's share, each there once for all containers that have its source.

What a guest reaches by two mounts of the host it takes for two file systems: one container would not see the locks that
another one holds, nor what that has mapped into memory.
"""

import os
import stat
from functools import partial
from pathlib import Path
from typing import NamedTuple

from msgspec import Struct, field

from katapod.host.mountinfo import mounts_below
from katapod.host.mounts import bind, mount_given
from katapod.host.own_mounts import in_host_mounts
from katapod.host.removal import remove_tree
from katapod.model import oci
from katapod.model.errors import KatapodError, NotFound
from katapod.model.layout import GUEST_SHARE
from katapod.model.mount_options import Access, is_recursive, parse_access
from katapod.model.tokens import random_hex

__all__ = ["VOLUME_PREFIX", "SharedVolumes"]

AUTOMOUNTS_MAX = 200  # below one source, as below a host's /; the others are as read-only as the top
VOLUME_PREFIX = "volume-"  # of names in the share; 16 hexadecimal digits, a dash and the destination's name follow
NAME_BYTES = 100  # of the destination's; 255 are a name's limit


class _Source(NamedTuple):
    """A path of the host: `below` are the mount points below it, what is above before what is below."""

    identity: tuple[int, int, str]
    is_directory: bool
    below: tuple[str, ...]


class _Share(Struct):
    path: Path
    source: _Source | None
    access: Access
    recursive: bool
    users: set[str] = field(default_factory=set)

    def serves(self, source: _Source, recursive: bool, wanted: Access) -> bool:
        """A guest sees to read-only mounts itself; but what is mounted below would be the same for all."""
        if not self.users or self.source is None or self.source.identity != source.identity:
            return False
        if self.recursive != recursive:
            return False
        if recursive and (self.source.below or source.below):
            return self.source.below == source.below and self.access is wanted
        return self.access is Access.WRITABLE or wanted is not Access.WRITABLE


class SharedVolumes:
    """Of one sandbox. `mounts` is the directory that is shared with the guest."""

    def __init__(self, mounts: Path) -> None:
        self._mounts = mounts
        self._shares: list[_Share] = []

    def add(self, mount: oci.Mount, container_id: str, *, ours: bool = False) -> str:
        """Bring what is mounted from the host to the guest; returns its name in the share. `ours`: this process
        has made it, and need not look for it among the host's mounts.

        What no container of the sandbox may write the host makes read-only. Raises NotFound, MountFailed.
        """
        share = self._shared(mount, ours) if oci.is_bind(mount) else self._own(mount)
        share.users.add(container_id)
        return share.path.name

    def automounts(self, container_id: str) -> list[str]:
        """Paths of the guest where another file system begins, to be mounted before the container is created.

        So all containers get the same. What the guest mounts by itself takes over the flags of the mount above: where
        that is read-only at its top only, what is below is mounted before, too.
        """
        found = []
        for share in self._shares:
            if container_id not in share.users or share.source is None or not share.source.is_directory:
                continue
            base = f"{GUEST_SHARE}/{share.path.name}"
            found.append(base)
            if share.recursive and share.access is Access.TOP_READ_ONLY:
                found += [f"{base}/{point}" for point in share.source.below[:AUTOMOUNTS_MAX]]
        return found

    def drop(self, container_id: str) -> list[str]:
        """Take away what only this container had; returns what did not work, which is tried again. Idempotent."""
        problems = []
        for share in list(self._shares):
            share.users.discard(container_id)
            if share.users:
                continue
            try:
                remove_tree(share.path)
                self._shares.remove(share)
            except KatapodError as exc:
                problems.append(str(exc))
        return problems

    def _shared(self, mount: oci.Mount, ours: bool) -> _Share:
        access, recursive = parse_access(mount.options), is_recursive(mount.options)
        try:
            source = _look_at(mount.source) if ours else in_host_mounts(partial(_look_at, mount.source))
        except OSError as exc:
            raise NotFound(f"cannot mount {mount.source}: {exc.strerror}") from exc
        for share in self._shares:
            if share.serves(source, recursive, access):
                return share
        path = self._new_path(mount)
        bind(Path(mount.source), path, access, recursive=recursive, own=ours)
        return self._add(_Share(path, source, access, recursive))

    def _own(self, mount: oci.Mount) -> _Share:
        """CRI-O's image volumes are overlays of the image's own directories."""
        path = self._new_path(mount)
        path.mkdir(mode=0o700)
        share = self._add(_Share(path, None, Access.WRITABLE, recursive=False))
        mount_given(mount.type, mount.source, mount.options, path)
        return share

    def _new_path(self, mount: oci.Mount) -> Path:
        name = os.path.basename(mount.destination.rstrip("/")) or "root"
        base = os.fsencode(name)[-NAME_BYTES:].decode(errors="ignore")  # the guest is told of it, in UTF-8
        return self._mounts / f"{VOLUME_PREFIX}{random_hex(8)}-{base}"

    def _add(self, share: _Share) -> _Share:
        self._shares.append(share)
        return share


def _look_at(path: str) -> _Source:
    """What is there, and by which mount, which has flags of its own. Raises OSError. Source: proc(5), fdinfo."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    finally:
        os.close(fd)
    below: list[str] = []
    if is_directory := stat.S_ISDIR(status.st_mode):
        top = os.path.realpath(path)
        below = [os.path.relpath(point, top) for point in reversed(mounts_below(Path(top))) if point != top]
    mount_id = next(line for line in lines if line.startswith("mnt_id:"))
    return _Source((status.st_dev, status.st_ino, mount_id), is_directory, tuple(below))
