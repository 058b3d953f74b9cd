"""A network that somebody asks for by `network create`: a bridge of its own, as a list of CNI plugins. Pure."""

import hashlib
import ipaddress
from typing import Any

from msgspec import Struct, field

from katapod.model.flags import refuse
from katapod.plan.bridge import LEASES

__all__ = ["NetworkWish", "bridge_device", "check_wish", "plan_user_network"]

EXAMPLE = "10.20.0.0/24"
MTU_MIN, MTU_MAX = 576, 65535  # RFC 791: what every host takes; the largest of a tap


class NetworkWish(Struct, frozen=True, kw_only=True):
    """`subnet`: empty: any that is free. `gateway`: empty: its first address. `ip_range`: of which containers get
    theirs; empty: all of the subnet. `internal`: only the containers reach each other. `mtu`: 0: the usual one."""

    name: str
    subnet: str = ""
    gateway: str = ""
    ip_range: str = ""
    internal: bool = False
    mtu: int = 0
    labels: dict[str, str] = field(default_factory=dict)


def bridge_device(name: str) -> str:
    """Its bridge: a network's name may be longer than that of an interface, which has 15 bytes at most (IFNAMSIZ)."""
    return f"kata-{hashlib.sha256(name.encode()).hexdigest()[:10]}"


def check_wish(wish: NetworkWish) -> None:
    """Raises UsageError for values that cannot be together, or are none."""
    if not wish.subnet:
        for flag, text in (("--gateway", wish.gateway), ("--ip-range", wish.ip_range)):
            if text:
                refuse(flag, text, "it needs --subnet", f"--subnet {EXAMPLE}")
    else:
        subnet = _network("--subnet", wish.subnet)
        if subnet.prefixlen > 30:
            refuse("--subnet", wish.subnet, "it has no room for a gateway and a container", EXAMPLE)
        if wish.gateway:
            try:
                address = ipaddress.IPv4Address(wish.gateway)
            except ValueError:
                refuse("--gateway", wish.gateway, "it is no IPv4 address", "10.20.0.1")
            if address not in subnet or address in (subnet.network_address, subnet.broadcast_address):
                refuse("--gateway", wish.gateway, f"it is no address of {subnet}", str(subnet[1]))
        if wish.ip_range and not _network("--ip-range", wish.ip_range).subnet_of(subnet):
            refuse("--ip-range", wish.ip_range, f"it is not within {subnet}", str(subnet))
    if wish.mtu and not MTU_MIN <= wish.mtu <= MTU_MAX:
        refuse("--opt", f"mtu={wish.mtu}", f"it is not within {MTU_MIN} and {MTU_MAX}", "mtu=1400")


def _network(flag: str, text: str) -> ipaddress.IPv4Network:
    try:
        found = ipaddress.ip_network(text)
    except ValueError:
        refuse(flag, text, "it is no network: ADDRESS/PREFIX, without bits beyond the prefix", EXAMPLE)
    if not isinstance(found, ipaddress.IPv4Network):
        refuse(flag, text, "it is none of IPv4; a file of /etc/cni/net.d can have one of IPv6", EXAMPLE)
    return found


def plan_user_network(wish: NetworkWish, subnet: str) -> dict[str, Any]:
    """The document of its .conflist. `subnet`: that of the wish, or one that was chosen."""
    network = ipaddress.IPv4Network(subnet)
    addresses: dict[str, str] = {"subnet": subnet, "gateway": wish.gateway or str(network[1])}
    if wish.ip_range:
        part = ipaddress.IPv4Network(wish.ip_range)
        whole = part == network
        addresses["rangeStart"] = str(part[1] if whole or part[0] == network[0] else part[0])
        addresses["rangeEnd"] = str(part[-2] if whole or part[-1] == network[-1] else part[-1])
    bridge: dict[str, Any] = {
        "type": "bridge",
        "bridge": bridge_device(wish.name),
        "isGateway": not wish.internal,
        "ipMasq": not wish.internal,
        "hairpinMode": True,
        "capabilities": {"ips": True, "mac": True},
        "ipam": {
            "type": "host-local",
            "dataDir": LEASES,
            "ranges": [[addresses]],
            "routes": [] if wish.internal else [{"dst": "0.0.0.0/0"}],
        },
    }
    if wish.mtu:
        bridge["mtu"] = wish.mtu
    plugins = [bridge]
    if not wish.internal:
        plugins.append({"type": "portmap", "capabilities": {"portMappings": True}, "snat": True})
    plugins.append({"type": "firewall", "backend": "iptables"})
    return {"cniVersion": "1.0.0", "name": wish.name, "katapodLabels": wish.labels, "plugins": plugins}
