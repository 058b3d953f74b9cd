"""The mount namespace of a process that owns a sandbox, and the host's, which it has left.

What such a process mounts is seen by itself and by the programs that it starts, and goes with the last of them. Mounts
and unmounts of the host reach it where the host shares them (mount_namespaces(7)); nothing goes the other way. Where
the host does not share them, its later mounts are found by going back for a moment: see in_host_mounts.
"""

import contextlib
import os
from collections.abc import Callable
from typing import TypeVar

from katapod.host.own_thread import in_own_thread
from katapod.kernel.mount import MS_REC, MS_SLAVE, mount
from katapod.kernel.process import CLONE_FS, CLONE_NEWNS, setns, unshare
from katapod.model.errors import HostLacks

__all__ = ["enter_host_mounts", "in_host_mounts", "leave_host_mounts"]

_Result = TypeVar("_Result")
_host: tuple[int, int] | None = None  # descriptors of the namespace that we have left, and of our root in it


def leave_host_mounts() -> None:
    """Give this process a mount namespace of its own. Idempotent. Called before there is a second thread: only the
    calling one, and those that it starts later, are in it. Raises HostLacks."""
    global _host
    if _host is not None:
        return
    namespace = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        unshare(CLONE_NEWNS)
        _follow_host()
    except OSError as exc:
        os.close(namespace)
        os.close(root)
        raise HostLacks(
            f"cannot make a mount namespace: {exc.strerror}", hint="Katapod needs CAP_SYS_ADMIN on this host"
        ) from exc
    _host = namespace, root


def _follow_host() -> None:
    """Make all mounts of this namespace slaves of the host's. Raises OSError."""
    with contextlib.ExitStack() as stack:
        places = [os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) for path in ("/", ".")]
        for place in places:
            stack.callback(os.close, place)
        own = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, own)
        setns(own, CLONE_NEWNS)  # to the namespace's own root: ours may be a directory in it (chroot(2))
        mount("none", "/", None, MS_REC | MS_SLAVE)
        root, here = places
        os.fchdir(root)
        os.chroot(".")
        os.fchdir(here)


def in_host_mounts(work: Callable[[], _Result]) -> _Result:
    """Run `work` where the host's mounts are, in a thread of its own; paths have to be absolute. Blocks. For paths that
    users and engines name, and for mounts that others have to see. Raises what `work` raises, OSError."""
    if _host is None:
        return work()

    def enter() -> _Result:
        unshare(CLONE_FS)  # of what threads share, the root and the working directory
        enter_host_mounts()
        return work()

    return in_own_thread(enter, name="in-host-mounts")


def enter_host_mounts() -> None:
    """Move the calling thread, or a child before it executes its program, to the host's mounts; its working directory
    is the root then. Raises OSError."""
    if _host is None:
        return
    namespace, root = _host
    setns(namespace, CLONE_NEWNS)
    os.fchdir(root)  # setns(2) leads to the root of the namespace, which need not be ours
    os.chroot(".")
