"""The mount namespace of a container's proxy: its root file system and volumes, as the host has them, and nothing else.

Engines look at a container's files by way of its process: Podman copies from and to a container that runs in the mount
namespace of that. The guest has the same files by way of the share.
"""

import contextlib
import logging
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from msgspec import Struct

from katapod.host.own_mounts import in_host_mounts
from katapod.host.own_thread import in_own_thread
from katapod.kernel.confine import pivot_root
from katapod.kernel.mount import (
    MNT_DETACH,
    MOUNT_ATTR_RDONLY,
    MS_BIND,
    MS_PRIVATE,
    MS_REC,
    MS_SLAVE,
    attach_tree_at,
    clone_tree,
    mount,
    set_tree_attributes,
    umount,
)
from katapod.kernel.openat2 import open_in_root
from katapod.kernel.process import CLONE_FS, CLONE_NEWNS, setns, unshare
from katapod.model.errors import KatapodError

__all__ = ["Volume", "add_volumes", "proxy_mounts"]

log = logging.getLogger(__name__)


class Volume(Struct, frozen=True):
    """A bind mount of the container's: `destination` is looked up in its root file system."""

    source: str
    destination: str
    read_only: bool


def proxy_mounts(rootfs: Path) -> int:
    """Make the namespace; the descriptor that holds it is the caller's. Raises KatapodError."""

    def work() -> int:
        unshare(CLONE_NEWNS)
        namespace = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _go_into(os.path.abspath(rootfs))
        except BaseException:
            os.close(namespace)
            raise
        return namespace

    try:
        return in_host_mounts(lambda: in_own_thread(work, name="proxy-mounts"))
    except OSError as exc:
        raise KatapodError(f"cannot make a mount namespace for {rootfs}: {exc.strerror}") from exc


def _go_into(rootfs: str) -> None:
    """Raises OSError."""
    mount("none", "/", None, MS_REC | MS_SLAVE)
    mount(rootfs, rootfs, None, MS_BIND | MS_REC)
    mount("none", rootfs, None, MS_REC | MS_PRIVATE)
    os.chdir(rootfs)
    pivot_root(".", ".")  # the old root is mounted over the new one, from where it is detached
    umount(".", MNT_DETACH)


def add_volumes(namespace: int, volumes: Iterable[Volume]) -> None:
    """Bind volumes in the namespace: once the guest has made their places. What cannot be is left out."""
    with contextlib.ExitStack() as stack:
        trees = []
        for volume in volumes:
            try:
                trees.append((volume, in_host_mounts(partial(_clone, volume))))
                stack.callback(os.close, trees[-1][1])
            except OSError as exc:
                log.debug("the proxy does not see %s: %s", volume.source, exc.strerror)

        def work() -> None:
            unshare(CLONE_FS)
            setns(namespace, CLONE_NEWNS)
            root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                for volume, tree in trees:
                    try:
                        _attach(root, tree, volume)
                    except OSError as exc:
                        log.debug("the proxy does not see %s: %s", volume.destination, exc.strerror)
            finally:
                os.close(root)

        if trees:
            in_own_thread(work, name="proxy-volumes")


def _clone(volume: Volume) -> int:
    """Raises OSError."""
    tree = clone_tree(volume.source)
    set_tree_attributes(tree, attributes=MOUNT_ATTR_RDONLY if volume.read_only else 0, propagation=MS_PRIVATE)
    return tree


def _attach(root: int, tree: int, volume: Volume) -> None:
    """The place may be a link of the container's: it does not lead out of its root. Raises OSError."""
    place = open_in_root(root, volume.destination, os.O_PATH)
    try:
        attach_tree_at(tree, place)
    finally:
        os.close(place)
