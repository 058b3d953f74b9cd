"""Mounts on the host: binds, overlays, and their removal. Everything is below a sandbox's own directories.

Targets are created here and never taken from a guest; sources are what the user named. No device node can be opened
there: a guest's kernel opens its own devices, and virtiofsd, which makes nodes for it, must not reach the host's if it
is taken over.
"""

import contextlib
import errno
import logging
import os
import shutil
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from katapod.host.hints import hint_for
from katapod.host.mountinfo import mounts_below, read_mounts
from katapod.host.own_mounts import in_host_mounts
from katapod.host.own_thread import in_own_thread
from katapod.kernel.mount import (
    MNT_DETACH,
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_RDONLY,
    MS_BIND,
    MS_NODEV,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
    MS_SHARED,
    MS_SLAVE,
    attach_tree,
    clone_tree,
    mount,
    parse_options,
    set_tree_attributes,
    umount,
)
from katapod.kernel.process import CLONE_FS, unshare
from katapod.model.errors import KatapodError, NotFound
from katapod.model.mount_options import Access

__all__ = [
    "bind",
    "export_directory",
    "mount_given",
    "mount_overlay",
    "topmost",
    "unmount_below",
]

log = logging.getLogger(__name__)

OPTIONS_MAX = os.sysconf("SC_PAGE_SIZE")  # bytes of options that mount(2) reads, with the zero at the end


class MountFailed(KatapodError):
    pass


def export_directory(mounts: Path, shared: Path) -> None:
    """Make `shared` the read-only, live view of `mounts` that is given to the guest.

    What is mounted below `mounts` later appears below `shared`, with flags of its own, and then inside
    virtiofsd's mount namespace: `mounts` is a shared peer, `shared` its slave. The top of the view is
    read-only, so that a guest cannot put files beside what it was given.
    """
    mounts.mkdir(mode=0o700, parents=True, exist_ok=True)
    shared.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        mount(str(mounts), str(mounts), None, MS_BIND)
        # private first: the host's / may be a shared peer, which would copy all this into other namespaces
        mount("none", str(mounts), None, MS_PRIVATE)
        mount("none", str(mounts), None, MS_SHARED)
        mount(str(mounts), str(shared), None, MS_BIND)
        mount("none", str(shared), None, MS_SLAVE)
        mount("none", str(shared), None, MS_SHARED)
        mount("none", str(shared), None, MS_REMOUNT | MS_BIND | MS_RDONLY)
    except OSError as exc:
        raise MountFailed(f"cannot export {mounts}: {exc.strerror}", hint=hint_for(exc)) from exc


def bind(
    source: Path, target: Path, access: Access = Access.WRITABLE, *, recursive: bool = True, own: bool = False
) -> None:
    """Bind a file or directory, if `recursive` with the mounts below it, to `target`, which is made.

    `source` is what the host has there now, or, with `own`, what this process has made or mounted. The copy is complete
    before it is attached: private, since an unmount below a shared one would reach the user's own tree, and read-only
    where it has to be, since what is propagated to the exported view (export_directory) keeps the flags it has then.
    Raises NotFound, MountFailed.
    """
    path = os.path.abspath(source)
    kind = 0

    def clone() -> int:
        nonlocal kind
        kind = os.stat(path).st_mode
        return clone_tree(path, recursive=recursive)

    try:
        tree = clone() if own else in_host_mounts(clone)
    except OSError as exc:
        if not kind:
            raise NotFound(f"cannot mount {source}: {exc.strerror}") from exc
        raise MountFailed(f"cannot bind {source} to {target}: {exc.strerror}") from exc
    try:
        try:
            if stat.S_ISDIR(kind):
                target.mkdir(mode=0o700, parents=True, exist_ok=True)
            else:
                target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                target.touch(mode=0o600)
            read_only = MOUNT_ATTR_RDONLY if access is Access.READ_ONLY else 0
            set_tree_attributes(tree, attributes=read_only | MOUNT_ATTR_NODEV, propagation=MS_PRIVATE)
            if access is Access.TOP_READ_ONLY:
                set_tree_attributes(tree, attributes=MOUNT_ATTR_RDONLY, recursive=False)
            attach_tree(tree, str(target))
        finally:
            os.close(tree)
    except OSError as exc:
        raise MountFailed(f"cannot bind {source} to {target}: {exc.strerror}") from exc


def mount_overlay(lower: Path, upper: Path, work: Path, target: Path) -> None:
    """Mount `lower` with a writable layer at `target`, which may be there already. All paths are our own: none needs
    escaping."""
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    try:
        fresh = not work.exists()  # which is made last
        for directory in (upper, target):
            directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        if fresh:
            # the root directory's owner and mode come from the upper layer
            shutil.copystat(lower, upper)
            owner = os.stat(lower)
            os.chown(upper, owner.st_uid, owner.st_gid)
        work.mkdir(mode=0o755, exist_ok=True)
        mount("overlay", str(target), "overlay", MS_NODEV, options)
    except OSError as exc:
        raise MountFailed(
            f"cannot mount the root file system: overlay on {upper.parent}: {exc.strerror}",
            hint="the directory must not lie on an overlay file system itself" if exc.errno == errno.EINVAL else "",
        ) from exc


def mount_given(kind: str, source: str, options: Iterable[str], target: Path) -> None:
    """Mount what a container engine describes: a bind mount, or a file system with options. Raises MountFailed.

    A layer of many images has options beyond the page that mount(2) takes; then paths of lower directories are
    written as seen from the one above them all, in a thread that has gone there.
    """
    flags, data = parse_options(options)
    try:
        if flags & MS_BIND:
            tree = in_host_mounts(lambda: clone_tree(os.path.abspath(source), recursive=bool(flags & MS_REC)))
            try:
                set_tree_attributes(tree, propagation=MS_PRIVATE)
                attach_tree(tree, str(target))
            finally:
                os.close(tree)
            if extra := flags & ~(MS_BIND | MS_REC):
                mount("none", str(target), None, MS_BIND | MS_REMOUNT | extra)
        elif len(os.fsencode(data)) < OPTIONS_MAX:
            mount(source, str(target), kind, flags, data)
        else:
            _mount_from_above(source, str(target), kind, flags, data)
    except OSError as exc:
        raise MountFailed(f"cannot mount {source} ({kind}) at {target}: {exc.strerror}") from exc


def _mount_from_above(source: str, target: str, kind: str, flags: int, data: str) -> None:
    """Raises OSError."""
    parts = data.split(",")
    lower = next((part.removeprefix("lowerdir=") for part in parts if part.startswith("lowerdir=")), "")
    directory = os.path.commonpath(lower.split(":")) if lower.startswith("/") else "/"
    shorter = "lowerdir=" + ":".join(os.path.relpath(path, directory) for path in lower.split(":"))
    options = ",".join(shorter if part.startswith("lowerdir=") else part for part in parts)

    def work() -> None:
        unshare(CLONE_FS)  # a working directory for this thread alone
        os.chdir(directory)
        mount(source, target, kind, flags, options)

    in_own_thread(work, name="mount")


def shared_memory_size(directory: Path) -> int | None:
    """Bytes that the shared memory mounted there can hold; None if it is none. Engines make one for all containers of a
    pod: a tmpfs that is called shm, where the kubelet's volumes and the host's own /dev/shm are called otherwise."""
    place = os.path.realpath(directory)
    found = [each for each in read_mounts() if each.point == place]
    if not found or (found[-1].fstype, found[-1].source) != ("tmpfs", "shm"):
        return None
    held = os.statvfs(place)
    return held.f_blocks * held.f_frsize


def topmost(points: Sequence[str]) -> dict[str, bool]:
    """Those that are not below another one, each with whether none is below it. The order stays."""
    found: dict[str, bool] = {}
    above = ""
    for point in sorted(points, key=lambda each: each.split("/")):
        if above and point.startswith(above + "/"):
            found[above] = False
        else:
            above = point
            found[point] = True
    return {point: found[point] for point in points if point in found}


def unmount_below(directory: Path) -> None:
    """Unmount all at or below `directory`; a busy one is detached. Idempotent. Raises MountFailed.

    A mount goes with all that is mounted below it in one call: each takes the kernel milliseconds (synchronize_rcu).
    """
    for _ in range(8):  # a propagated mount may appear twice; each round removes the visible ones
        points = mounts_below(directory)
        if not points:
            return
        for point, is_alone in topmost(points).items():
            try:
                umount(point, 0 if is_alone else MNT_DETACH)
            except OSError as exc:
                if exc.errno == errno.EBUSY:
                    log.debug("%s is busy and is detached", point)
                    with contextlib.suppress(FileNotFoundError):
                        umount(point, MNT_DETACH)
                elif exc.errno not in (errno.EINVAL, errno.ENOENT):
                    raise MountFailed(f"cannot unmount {point}: {exc.strerror}") from exc
    left = mounts_below(directory)
    if left:
        raise MountFailed(f"cannot unmount all of {directory}: {len(left)} mounts reappear")
