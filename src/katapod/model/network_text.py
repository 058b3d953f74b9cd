"""What ip(8) says of a pod's network namespace, parsed. Source: `ip -json -details`, ip-link(8), ip-route(8).

Only what a guest is told is kept. Keys of links and addresses that are not known are passed over, since iproute2 adds
some with each version; those of routes are said to be lost.
"""

import ipaddress
from collections.abc import Iterable
from typing import Any

import msgspec

from katapod.model.network import (
    IFA_F_DEPRECATED,
    IFA_F_NOPREFIXROUTE,
    LINK_FLAGS,
    RTN_UNICAST,
    RTNH_F_ONLINK,
    RTPROT_STATIC,
    SCOPES,
    TAP_NAME,
    Address,
    Interface,
    InterfaceKind,
    Neighbour,
    NetworkError,
    NextHop,
    PodNetworkFacts,
    Route,
)

__all__ = ["parse_pod_network"]

_TYPES = {"unicast": RTN_UNICAST, "blackhole": 6, "unreachable": 7, "prohibit": 8, "throw": 9}
_PROTOCOLS = {"redirect": 1, "boot": 3, "static": 4, "dhcp": 16, "zebra": 11, "bird": 12, "bgp": 186, "ospf": 188}
_BY_KERNEL = ("kernel", "ra")  # the guest's kernel makes them by itself
_PREFERENCES = {"": 0, "medium": 0, "high": 1, "low": 3}
_METRICS = {  # RTAX_*, and by what ip(8) divides what the kernel has
    "window": (3, 1),
    "rtt": (4, 8),
    "rttvar": (5, 4),
    "ssthresh": (6, 1),
    "cwnd": (7, 1),
    "advmss": (8, 1),
    "reordering": (9, 1),
    "hoplimit": (10, 1),
    "initcwnd": (11, 1),
    "rto_min": (13, 1),
    "initrwnd": (14, 1),
    "quickack": (15, 1),
    "fastopen_no_cookie": (17, 1),
}
RTAX_LOCK = 1
_FEATURES = {"ecn": 1}
_NOT_CARRIED = ("encap", "from", "realm", "realms", "expires")


class _LinkInfo(msgspec.Struct, frozen=True):
    info_kind: str = ""
    info_data: dict[str, Any] = {}


class _AddressInfo(msgspec.Struct, frozen=True):
    local: str = ""
    peer: str = msgspec.field(default="", name="address")
    prefixlen: int = 0
    scope: str = "global"
    broadcast: str = ""
    label: str = ""
    metric: int = 0
    tentative: bool = False
    dadfailed: bool = False
    deprecated: bool = False
    noprefixroute: bool = False


class _Link(msgspec.Struct, frozen=True):
    ifindex: int = 0
    ifname: str = ""
    flags: tuple[str, ...] = ()
    mtu: int = 0
    txqlen: int = 0
    link_type: str = ""
    address: str = ""
    link_index: int = 0
    linkinfo: _LinkInfo = _LinkInfo()
    addr_info: tuple[_AddressInfo, ...] = ()


class _Via(msgspec.Struct, frozen=True):
    host: str = ""


class _Hop(msgspec.Struct, frozen=True):
    gateway: str = ""
    via: _Via = _Via()
    dev: str = ""
    weight: int = 1
    flags: tuple[str, ...] = ()


class _RouteInfo(msgspec.Struct, frozen=True):
    type: str = "unicast"
    dst: str = ""
    gateway: str = ""
    via: _Via = _Via()
    dev: str = ""
    table: str = "main"
    protocol: str = ""
    scope: str = "global"
    prefsrc: str = ""
    pref: str = ""  # IPv6 only
    tos: str = ""
    flags: tuple[str, ...] = ()
    metric: int = 0
    metrics: tuple[dict[str, Any], ...] = ()
    nexthops: tuple[_Hop, ...] = ()

    @property
    def shown(self) -> str:
        return f"{'' if self.type == 'unicast' else f'{self.type} '}{self.dst or 'default'}"

    @property
    def is_v6(self) -> bool:
        return bool(self.pref) or ":" in self.dst or ":" in self.gateway


class _NeighbourInfo(msgspec.Struct, frozen=True):
    dst: str = ""
    dev: str = ""
    lladdr: str = ""
    state: tuple[str, ...] = ()


def parse_pod_network(links: bytes, routes: bytes, neighbours: bytes) -> PodNetworkFacts:
    """Parse what `addr show`, `route show table all` and `neigh show` say, each as JSON with details.

    Loopback, our own taps and interfaces without any address (the kernel's fallback tunnels, those that are not set
    up yet) are left out. Raises NetworkError for an interface of a kind that no guest can be given.
    """
    try:
        found_links = msgspec.json.decode(links or b"[]", type=tuple[_Link, ...])
        raw_routes = msgspec.json.decode(routes or b"[]", type=tuple[dict[str, Any], ...])
        found_routes = msgspec.convert(raw_routes, tuple[_RouteInfo, ...])
        found_neighbours = msgspec.json.decode(neighbours or b"[]", type=tuple[_NeighbourInfo, ...])
    except (msgspec.DecodeError, msgspec.ValidationError) as exc:
        raise NetworkError(f"cannot read the pod's network: ip(8) says what is not understood: {exc}") from exc
    given = [link for link in found_links if _is_given(link)]
    names = {link.ifname for link in given}
    lost = [
        f"{key} of the route {info.shown}"
        for raw, info in zip(raw_routes, found_routes, strict=True)
        for key in _NOT_CARRIED
        if key in raw and _is_asked_for(info)
    ]
    carried = [info for info in found_routes if _is_carried(info, names, lost)]
    interfaces = []
    for link in given:
        own_routes = _parse_routes([info for info in carried if info.dev == link.ifname], lost)
        interfaces.append(
            Interface(
                index=link.ifindex,
                name=link.ifname,
                kind=_kind_of(link),
                mac=link.address,
                mtu=link.mtu,
                flags=sum(LINK_FLAGS[flag] for flag in link.flags if flag in LINK_FLAGS),
                tx_queue_len=link.txqlen,
                no_link_local="LOWER_UP" in link.flags and not any(":" in info.local for info in link.addr_info),
                multi_queue=bool(link.linkinfo.info_data.get("multi_queue")),
                peer_index=link.link_index,
                addresses=_addresses_of(link, found_routes),
                routes=own_routes,
                neighbours=_neighbours_of(link.ifname, found_neighbours, own_routes),
            )
        )
    others = _parse_routes([info for info in carried if info.dev not in names], lost)
    return PodNetworkFacts(tuple(interfaces), others, tuple(dict.fromkeys(lost)))


def _is_given(link: _Link) -> bool:
    addresses = [info for info in link.addr_info if info.local and not info.dadfailed]
    return bool(addresses) and "LOOPBACK" not in link.flags and not TAP_NAME.fullmatch(link.ifname)


def _kind_of(link: _Link) -> InterfaceKind:
    kind = link.linkinfo.info_kind or "device"
    if kind == "tun":
        if link.linkinfo.info_data.get("type") == "tap":
            return InterfaceKind.TAP
        kind = "tun in IP mode"
    elif kind == "ipvlan" and link.linkinfo.info_data.get("mode") == "l3s":
        # what comes in is handed on behind the place where filters of the interface could redirect it
        raise NetworkError(
            f"cannot give the interface {link.ifname} to a guest: it is an ipvlan in mode l3s",
            hint="use ipvlan in mode l2 or l3, or macvlan",
        )
    elif link.link_type == "ether":
        for known in (InterfaceKind.VETH, InterfaceKind.MACVLAN, InterfaceKind.IPVLAN, InterfaceKind.DEVICE):
            if kind == known.value:
                return known
    raise NetworkError(
        f"cannot give the interface {link.ifname} to a guest: interfaces of kind {kind} are not supported",
        hint="veth, macvlan, ipvlan and tap are",
    )


def _addresses_of(link: _Link, routes: tuple[_RouteInfo, ...]) -> tuple[Address, ...]:
    return tuple(
        Address(
            info.local,
            info.prefixlen,
            peer=info.peer,
            flags=(IFA_F_DEPRECATED if info.deprecated else 0)
            | (IFA_F_NOPREFIXROUTE if info.noprefixroute or _lacks_route(link, info, routes) else 0),
            scope=_scope(info.scope),
            metric=info.metric,
            label="" if info.label == link.ifname else info.label,
            broadcast=info.broadcast,
        )
        for info in link.addr_info
        if info.local and not info.dadfailed
    )


def _lacks_route(link: _Link, info: _AddressInfo, routes: tuple[_RouteInfo, ...]) -> bool:
    """Whether somebody has deleted the route that the kernel makes for an address: the guest's would make it again."""
    network = ipaddress.ip_interface(f"{info.peer or info.local}/{info.prefixlen}").network
    alone = network.version == 4 and network.prefixlen == 32 and not info.peer  # there is none for such
    if "UP" not in link.flags or info.tentative or network.is_link_local or alone:
        return False
    return not any(
        route.dev == link.ifname and route.protocol in _BY_KERNEL and _is_network(route.dst, network)
        for route in routes
        if route.type == "unicast"
    )


def _is_network(dst: str, network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> bool:
    try:
        return ipaddress.ip_network(dst) == network
    except ValueError:  # "default", or a name that somebody has given to it
        return False


def _is_asked_for(info: _RouteInfo) -> bool:
    """Whether somebody, and not the kernel, has made it."""
    return info.protocol not in _BY_KERNEL and (info.table != "local" or info.type not in ("broadcast", "anycast"))


def _is_carried(info: _RouteInfo, names: set[str], lost: list[str]) -> bool:
    """Whether a guest can have this route; what somebody asked for and it cannot have goes to `lost`."""
    if not _is_asked_for(info):
        return False
    if info.table != "main":
        lost.append(f"the routes of table {info.table}")
        return False
    if info.type not in _TYPES:
        lost.append(f"the route {info.shown}")
        return False
    if info.type != "unicast":
        return True
    missing = {dev for dev in [hop.dev for hop in info.nexthops] or [info.dev] if dev not in names and dev != "lo"}
    if missing:
        lost.append(f"the route {info.shown} by {', '.join(sorted(missing))}, which the guest does not have")
    return not missing


def _parse_routes(routes: Iterable[_RouteInfo], lost: list[str]) -> tuple[Route, ...]:
    """IPv4 before IPv6, each by its metric."""
    return tuple(sorted((_parse_route(info, lost) for info in routes), key=lambda route: (route.is_v6, route.metric)))


def _parse_route(info: _RouteInfo, lost: list[str]) -> Route:
    values = {key: value for part in info.metrics for key, value in part.items()}
    congestion = str(values.pop("congestion", "") or "")
    mtu = values.pop("mtu", 0)
    features = sum(bit for name, bit in _FEATURES.items() if name in values)
    metrics = [(12, features)] if features else []
    for key, value in values.items():
        if key in _METRICS and isinstance(value, int):
            number, factor = _METRICS[key]
            metrics.append((number, value * factor))
        elif key not in _FEATURES:
            lost.append(f"{key} of the route {info.shown}")
    if "rto_min" in values:
        metrics.append((RTAX_LOCK, 1 << _METRICS["rto_min"][0]))  # as ip-route(8) sets it: the kernel heeds no other
    return Route(
        dest="" if info.dst in ("default", "0.0.0.0/0", "::/0") else info.dst,
        is_v6=info.is_v6,
        gateway=info.gateway or info.via.host,
        source=info.prefsrc,
        scope=_scope(info.scope),
        flags=RTNH_F_ONLINK if "onlink" in info.flags else 0,
        mtu=mtu if isinstance(mtu, int) else 0,
        metric=info.metric,
        type=_TYPES[info.type],
        tos=int(info.tos, 16) if info.tos.startswith("0x") else 0,
        protocol=_number(info.protocol, _PROTOCOLS, RTPROT_STATIC),
        metrics=tuple(sorted(metrics)),
        congestion=congestion,
        nexthops=tuple(
            NextHop(hop.dev, hop.gateway or hop.via.host, hop.weight, RTNH_F_ONLINK if "onlink" in hop.flags else 0)
            for hop in info.nexthops
        ),
        preference=_PREFERENCES.get(info.pref, 0),
        device=info.dev if info.dev == "lo" and info.type == "unicast" else "",
    )


def _scope(name: str) -> int:
    return _number(name, SCOPES, 0)


def _number(name: str, known: dict[str, int], default: int) -> int:
    return known[name] if name in known else int(name) if name.isdigit() else default


def _neighbours_of(
    name: str, neighbours: tuple[_NeighbourInfo, ...], routes: tuple[Route, ...]
) -> tuple[Neighbour, ...]:
    """Those that do not change, and the default gateway's: without it many pods would ask for it at once."""
    gateways = {route.gateway for route in routes if not route.dest and route.gateway}
    return tuple(
        Neighbour(info.dst, info.lladdr)
        for info in neighbours
        if info.dev == name
        and info.lladdr
        and ("PERMANENT" in info.state or (info.dst in gateways and "REACHABLE" in info.state))
    )
