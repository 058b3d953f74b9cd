"""Namespaces that the containers of a sandbox share. `shared` is their table: type to the bind mount that keeps it."""

from __future__ import annotations

import _socket
import os

from katapod.agent import log
from katapod.agent.paths import SANDBOX_NS
from katapod.kernel.mount import MNT_DETACH, MS_BIND, mount, umount
from katapod.kernel.process import CLONE_NEWIPC, CLONE_NEWUTS, unshare

__all__ = ["drop_namespaces", "share_namespaces", "share_pid_namespace"]

GUEST_NAMESPACES = ("ipc", "uts")


def share_namespaces(shared: dict[str, str], hostname: str) -> None:
    """Make the sandbox's ipc and uts namespaces, kept as bind mounts. Raises OSError.

    The agent itself moves into them: a child for this would take 0.06 s under emulation.
    """
    os.makedirs(SANDBOX_NS, exist_ok=True)
    unshare(CLONE_NEWIPC | CLONE_NEWUTS)
    if hostname:
        _socket.sethostname(hostname)
    for kind in GUEST_NAMESPACES:
        path = f"{SANDBOX_NS}/{kind}"
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o444))
        mount(f"/proc/self/ns/{kind}", path, None, MS_BIND)
        shared[kind] = path


def share_pid_namespace(shared: dict[str, str], pid: int) -> None:
    """Let later containers join the pid namespace of the first one's init. Raises OSError."""
    path = f"{SANDBOX_NS}/pid"
    os.makedirs(SANDBOX_NS, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o444))
    mount(f"/proc/{pid}/ns/pid", path, None, MS_BIND)
    shared["pid"] = path


def drop_namespaces(shared: dict[str, str]) -> None:
    for path in shared.values():
        try:
            umount(path, MNT_DETACH)
            os.unlink(path)
        except OSError as exc:
            log.warning(f"cannot drop {path}: {exc.strerror}")
    shared.clear()
