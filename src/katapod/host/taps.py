"""Taps, made in the network namespace that the calling thread is in (netns.py, in_netns).

A VMM gets a tap in one of two ways (NicPlan.owner):

- **By descriptors** of its queues. Such a tap lives as long as somebody holds it: it goes with the VMM, however that
  ends.
- **By name**, where the VMM opens /dev/net/tun itself, as User-mode Linux does, without any capability: the tap has
  that process's user as its owner (TUNSETOWNER), and stays until it is deleted (TUNSETPERSIST), since the guest opens
  it when it brings its interface up and lets go of it when it takes it down. Meanwhile it looks as if nobody had it,
  so whoever made it holds a claim: a socket with an abstract address, which is unique in a network namespace and ends
  with its holder.

Source: the kernel's networking/tuntap, linux/if_tun.h, unix(7).
"""

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Collection

from katapod.kernel.netlink import Link, Netlink
from katapod.model.network import TAP_NAME
from katapod.plan.network import NicPlan

__all__ = ["close_all", "delete_taps", "open_macvtap", "open_tap"]

TUNSETIFF, TUNSETPERSIST, TUNSETOWNER = 0x400454CA, 0x400454CB, 0x400454CC
IFF_TAP, IFF_NO_PI, IFF_MULTI_QUEUE, IFF_VNET_HDR = 0x0002, 0x1000, 0x0100, 0x4000
IFF_LOWER_UP = 0x10000


def open_tap(plan: NicPlan) -> list[int]:
    """Make the tap, or open the pod's own; returns its queues, or with an owner the claim. Raises OSError: EBUSY if
    another sandbox has it."""
    claim, queues = _claim(plan.tap), list[int]()
    flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
    if plan.queues > 1 or (plan.direct and plan.interface.multi_queue):
        flags |= IFF_MULTI_QUEUE
    made = False
    try:
        with Netlink() as netlink:
            if not plan.direct:
                _drop_stale_tap(netlink, plan.tap)
            for _ in range(plan.queues):
                queues.append(_open_queue("/dev/net/tun", plan.tap, flags))
                made = not plan.direct
            if plan.owner is not None:
                fcntl.ioctl(queues[0], TUNSETOWNER, plan.owner)
                fcntl.ioctl(queues[0], TUNSETPERSIST, 1)
            netlink.change_link(_link(netlink, plan.tap).index, mtu=0 if plan.direct else plan.interface.mtu, up=True)
    except BaseException:
        if made and plan.owner is not None:
            delete_taps({plan.tap})
        close_all(queues)
        claim.close()
        raise
    if plan.owner is not None:
        close_all(queues)  # a tap with one queue has one holder
        return [claim.detach()]
    claim.close()
    return queues


def open_macvtap(plan: NicPlan) -> list[int]:
    """The queues of one that is there. Raises OSError."""
    with Netlink() as netlink:
        path = f"/dev/tap{_link(netlink, plan.tap).index}"
    flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | (IFF_MULTI_QUEUE if plan.queues > 1 else 0)
    queues: list[int] = []
    try:
        for _ in range(plan.queues):
            queues.append(_open_queue(path, "", flags))
    except BaseException:
        close_all(queues)
        raise
    return queues


def delete_taps(names: Collection[str]) -> None:
    """Those of them that are there and are taps of ours. Raises OSError."""
    with Netlink() as netlink:
        for link in netlink.links():
            if link.name in names and TAP_NAME.fullmatch(link.name):
                try:
                    netlink.delete_link(link.index)
                except OSError as exc:  # it may go by itself, with the last thread of a QEMU that was killed
                    if exc.errno not in (errno.ENODEV, errno.ENOENT, errno.ESRCH):
                        raise


def close_all(fds: list[int]) -> None:
    """Idempotent: the list is empty then."""
    while fds:
        os.close(fds.pop())


def _claim(tap: str) -> socket.socket:
    """Raises OSError: EBUSY if another process has it."""
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        claim.bind(f"\0katapod/{tap}")
    except OSError as exc:
        claim.close()
        if exc.errno == errno.EADDRINUSE:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY)) from exc
        raise
    return claim


def _open_queue(path: str, tap: str, flags: int) -> int:
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", tap.encode(), flags))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _link(netlink: Netlink, name: str) -> Link:
    """Raises OSError."""
    for link in netlink.links():
        if link.name == name:
            return link
    raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))


def _drop_stale_tap(netlink: Netlink, name: str) -> None:
    """Delete a tap of that name that nobody holds, once nobody has a claim to it; one that is held has carrier. Raises
    OSError."""
    for link in netlink.links():
        if link.name == name:
            if link.flags & IFF_LOWER_UP:
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
            netlink.delete_link(link.index)
