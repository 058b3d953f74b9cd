"""What of this machine the built-in network depends on, and its bridge."""

import fcntl
import ipaddress
import json
import socket
import struct
from pathlib import Path

from katapod.host.loopback_guard import guard_loopback
from katapod.host.process import find_program, run
from katapod.model.errors import HostLacks, KatapodError
from katapod.plan.bridge import BRIDGE, BRIDGE_DEVICE

__all__ = ["bridge_subnet", "filters_forwarding", "nameservers", "networks_in_use", "remove_bridge", "resolv_conf_text"]

SIOCGIFADDR, SIOCGIFNETMASK = 0x8915, 0x891B  # linux/sockios.h
IP_LIMIT_S = 30.0
RESOLV_CONF = Path("/etc/resolv.conf")
BEHIND_STUB = Path("/run/systemd/resolve/resolv.conf")  # the servers that systemd-resolved asks itself


def bridge_subnet() -> str:
    """The subnet of the bridge; empty if there is no bridge, or it has no address yet."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            address, mask = (_ask(sock, request) for request in (SIOCGIFADDR, SIOCGIFNETMASK))
        except OSError:
            return ""
    return str(ipaddress.ip_network(f"{address}/{mask}", strict=False))


def _ask(sock: socket.socket, request: int) -> str:
    """struct ifreq: 16 bytes of name, then a sockaddr_in, whose address is at its fifth byte."""
    answer = fcntl.ioctl(sock, request, struct.pack("40s", BRIDGE_DEVICE.encode()))
    return socket.inet_ntoa(answer[20:24])


async def networks_in_use() -> list[str]:
    """Destinations of the host's IPv4 routes, of all tables, and its DNS servers. Raises KatapodError."""
    ip = find_program("ip", package="iproute2")
    done = await run([ip, "-json", "-4", "route", "show", "table", "all"], timeout_s=IP_LIMIT_S)
    try:
        routes = json.loads(done.stdout or "[]")
        found = [route["dst"] for route in routes if route["dst"] != "default"]
        for one in found:
            ipaddress.ip_network(one, strict=False)
    except (ValueError, KeyError, TypeError) as exc:
        raise KatapodError(f"cannot understand the routes of this host: {exc}") from exc
    return [*found, *nameservers(resolv_conf_text())]


def nameservers(text: str) -> list[str]:
    found = []
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            try:
                found.append(str(ipaddress.IPv4Address(words[1])))
            except ValueError:
                continue
    return found


def resolv_conf_text() -> str:
    """The host's resolv.conf; that behind systemd-resolved's stub where there is one. Empty if there is none."""
    for path in (BEHIND_STUB, RESOLV_CONF):
        try:
            return path.read_text(errors="replace")
        except OSError:
            continue
    return ""


async def filters_forwarding() -> bool:
    """Whether the host's firewall has a say in what is forwarded.

    Raises MissingProgram, HostLacks if addresses cannot be translated here: the kernel lacks it, or forbids it.
    """
    iptables = find_program("/usr/sbin/iptables", package="iptables")
    nat = await run([iptables, "-w", "5", "-t", "nat", "-S", "POSTROUTING"], timeout_s=IP_LIMIT_S, check=False)
    if nat.returncode != 0:
        raise HostLacks(
            f"cannot use network {BRIDGE}: this host does not translate addresses: {nat.stderr.strip()[-300:]}",
            hint="load the modules nf_nat and iptable_nat or nft_chain_nat, or run with --net none",
        )
    forward = await run([iptables, "-w", "5", "-S", "FORWARD"], timeout_s=IP_LIMIT_S, check=False)
    return forward.returncode != 0 or forward.stdout.strip() != "-P FORWARD ACCEPT"


async def remove_bridge() -> bool:
    """Remove the bridge; returns whether there was one. Raises KatapodError."""
    if BRIDGE_DEVICE not in (name for _, name in socket.if_nameindex()):  # /sys shows where it was mounted from
        return False
    ip = find_program("ip", package="iproute2")
    await run([ip, "link", "delete", BRIDGE_DEVICE], timeout_s=IP_LIMIT_S)
    await guard_loopback(())  # takes away the rules of a bridge that is no more
    return True
