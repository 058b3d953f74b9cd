"""The rules that keep sandboxes from the host's loopback, in the network namespace that we are in.

A rule stays as long as its bridge, whoever made that: the next start, or `network rm`, takes away what is stale.
"""

import logging
from collections.abc import Iterable
from pathlib import Path

from katapod.host.cni import in_turn
from katapod.host.process import find_program, run
from katapod.host.trace import span
from katapod.kernel.netlink import Link, Netlink
from katapod.model.errors import KatapodError, MissingProgram
from katapod.model.network import Interface, InterfaceKind
from katapod.plan.loopback_guard import guard_changes

__all__ = ["bridges_behind", "guard_loopback"]

log = logging.getLogger(__name__)

LIMIT_S = 30.0
ROUTE_LOCALNET = "/proc/sys/net/ipv4/conf/{}/route_localnet"


async def guard_loopback(interfaces: Iterable[Interface]) -> None:
    """Guard the bridges that the other ends of these interfaces are ports of, before a guest can send by them.

    Where iptables cannot do it we go on with a warning if the kernel would route such packets. Raises OSError.
    """
    with Netlink() as netlink:
        links = netlink.links()
    wanted = bridges_behind(interfaces, links)
    devices = [link.name for link in links]
    try:
        with span("guard the host's loopback"):
            iptables = find_program("/usr/sbin/iptables", package="iptables")
            if not guard_changes(await _rules(iptables), wanted, devices):
                return
            async with in_turn():  # two that check at once would both add
                if text := guard_changes(await _rules(iptables), wanted, devices):
                    argv = [f"{iptables}-restore", "-w", "5", "--noflush"]
                    await run(argv, input=text.encode(), timeout_s=LIMIT_S)
    except KatapodError as exc:
        routed = [name for name in wanted if _routes_loopback(name)]
        if routed:
            hint = exc.hint if isinstance(exc, MissingProgram) else "set it to 0 if no container's port is published"
            log.warning(
                "sandboxes may reach the host's 127.0.0.1: route_localnet is set on %s and cannot be guarded: %s (%s)",
                ", ".join(routed),
                exc,
                hint,
            )
        else:
            log.debug("no rule for the loopback: %s", exc)


async def _rules(iptables: str) -> str:
    return (await run([iptables, "-w", "5", "-t", "raw", "-S"], timeout_s=LIMIT_S)).stdout


def bridges_behind(interfaces: Iterable[Interface], links: Iterable[Link]) -> list[str]:
    """The bridges among `links` that have the other end of one of these veths as a port."""
    by_index = {link.index: link for link in links}
    found = []
    for interface in interfaces:
        port = by_index.get(interface.peer_index) if interface.kind is InterfaceKind.VETH else None
        if port is None or port.kind != "veth" or port.peer != interface.index:
            continue
        bridge = by_index.get(port.master)
        if bridge is not None and bridge.kind == "bridge":
            found.append(bridge.name)
    return list(dict.fromkeys(found))


def _routes_loopback(bridge: str) -> bool:
    try:
        return Path(ROUTE_LOCALNET.format(bridge)).read_text().strip() != "0"
    except OSError:
        return True
