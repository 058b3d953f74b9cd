"""Network namespaces with a name: /run/netns/kata-ID, as `ip netns` has them, among the host's mounts."""

import os
from pathlib import Path

from katapod.host.mounts import unmount_below
from katapod.host.netns import in_netns
from katapod.host.own_mounts import in_host_mounts
from katapod.host.process import find_program, run
from katapod.kernel.mount import MS_BIND, mount
from katapod.kernel.netlink import Netlink
from katapod.model.errors import KatapodError

__all__ = ["NETNS_ROOT", "current_netns", "is_netns", "make_netns", "netns_path", "remove_netns"]

NETNS_ROOT = Path("/run/netns")
IP_LIMIT_S = 30.0
LOOPBACK_INDEX = 1  # in every network namespace: it is made with it (LOOPBACK_IFINDEX, net/net_namespace.h)


def netns_path(sandbox_id: str) -> Path:
    return NETNS_ROOT / f"kata-{sandbox_id}"


async def make_netns(path: Path, of: int | None = None) -> None:
    """Make the namespace, or give the name to that of the descriptor `of`; with its loopback up. One of that name that
    exists already is a leftover, and is removed.

    Raises MissingProgram, ProcessFailed, KatapodError.
    """
    remove_netns(path)
    if of is None:
        ip = find_program("ip", package="iproute2")
        await run([ip, "netns", "add", path.name], timeout_s=IP_LIMIT_S, host_mounts=True)
    else:
        _name_netns(path, of)
    try:
        in_host_mounts(lambda: in_netns(path, _loopback_up))
    except OSError as exc:
        raise KatapodError(f"cannot bring up the loopback interface of {path}: {exc.strerror}") from exc


def _name_netns(path: Path, netns: int) -> None:
    """Raises KatapodError."""

    def work() -> None:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        path.touch(mode=0o000)
        mount(f"/proc/self/fd/{netns}", str(path), None, MS_BIND)

    try:
        in_host_mounts(work)
    except OSError as exc:
        raise KatapodError(f"cannot make the network namespace {path}: {exc.strerror}") from exc


def _loopback_up() -> None:
    with Netlink() as netlink:
        netlink.change_link(LOOPBACK_INDEX, up=True)


def remove_netns(path: Path) -> None:
    """Take the name away; the namespace goes when no process is left in it. Idempotent. Raises KatapodError."""
    in_host_mounts(lambda: unmount_below(path))
    try:
        path.unlink(missing_ok=True)
    except OSError as exc:
        raise KatapodError(f"cannot remove network namespace {path}: {exc.strerror}") from exc


def is_netns(path: Path) -> bool:
    """Whether a namespace has the name. One whose making was cut short may be a plain file. Raises OSError."""
    device = in_host_mounts(lambda: os.stat(path).st_dev)
    return device == os.stat("/proc/thread-self/ns/net").st_dev  # all of them are on one nsfs


def current_netns() -> str:
    """Ours, as device:inode. Raises OSError."""
    status = os.stat("/proc/thread-self/ns/net")
    return f"{status.st_dev}:{status.st_ino}"
