"""The network of a pod as it was found in its network namespace. Source: `ip -json -details`, ip-link(8) and others.

Only what a guest is told is kept. Unknown keys are passed over: iproute2 adds some with each version.
"""

import re
from dataclasses import dataclass
from enum import Enum
from typing import Any

import msgspec

from katapod.model.errors import KatapodError

__all__ = [
    "Address",
    "Interface",
    "InterfaceKind",
    "Interworking",
    "Neighbour",
    "NetworkError",
    "NicRecord",
    "NetworkRecord",
    "Route",
    "TAP_NAME",
    "parse_interfaces",
]

TAP_NAME = re.compile(r"tap\d+_kata")  # what is ours in a pod's namespace
RTNH_F_ONLINK = 4
NUD_PERMANENT = 0x80
SCOPES = {"global": 0, "site": 200, "link": 253, "host": 254, "nowhere": 255}


class NetworkError(KatapodError):
    """The pod's network cannot be given to the guest; the message names the interface and its kind."""


class Interworking(Enum):
    """How frames get from the pod's interface to the guest. The values of Kata's internetworking_model."""

    TCFILTER = "tcfilter"
    MACVTAP = "macvtap"
    NONE = "none"


class InterfaceKind(Enum):
    VETH = "veth"
    MACVLAN = "macvlan"
    IPVLAN = "ipvlan"
    DEVICE = "device"
    TAP = "tap"


@dataclass(frozen=True, slots=True)
class Address:
    address: str
    prefix: int

    @property
    def is_v6(self) -> bool:
        return ":" in self.address

    def __str__(self) -> str:
        return f"{self.address}/{self.prefix}"


@dataclass(frozen=True, slots=True)
class Route:
    """`dest` is empty for the default route, otherwise ADDRESS/PREFIX; `mtu` 0 means the interface's."""

    dest: str
    is_v6: bool
    gateway: str = ""
    source: str = ""
    scope: int = 0
    flags: int = 0
    mtu: int = 0


@dataclass(frozen=True, slots=True)
class Neighbour:
    address: str
    mac: str
    state: int = NUD_PERMANENT


@dataclass(frozen=True, slots=True)
class Interface:
    """One interface to be given to the guest."""

    index: int
    name: str
    kind: InterfaceKind
    mac: str
    mtu: int
    noarp: bool = False
    multi_queue: bool = False  # of a tap
    peer_index: int = 0  # of a veth's other end, in the network namespace that that is in
    addresses: tuple[Address, ...] = ()
    routes: tuple[Route, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()


class NicRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was made in the pod's network namespace for one interface."""

    interface: str
    tap: str
    model: str
    mac: str = ""  # of the interface, where the model takes it away for a while
    addresses: tuple[str, ...] = ()
    shaped: bool = False


class NetworkRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`inode` tells the namespace from another that later got the same path."""

    netns: str
    inode: int
    nics: tuple[NicRecord, ...] = ()


class _LinkInfo(msgspec.Struct, frozen=True):
    info_kind: str = ""
    info_data: dict[str, Any] = {}


class _AddressInfo(msgspec.Struct, frozen=True):
    local: str = ""
    prefixlen: int = 0
    scope: str = "global"
    tentative: bool = False
    dadfailed: bool = False


class _Link(msgspec.Struct, frozen=True):
    ifindex: int = 0
    ifname: str = ""
    flags: tuple[str, ...] = ()
    mtu: int = 0
    link_type: str = ""
    address: str = ""
    link_index: int = 0
    linkinfo: _LinkInfo = _LinkInfo()
    addr_info: tuple[_AddressInfo, ...] = ()


class _RouteInfo(msgspec.Struct, frozen=True):
    type: str = "unicast"
    dst: str = ""
    gateway: str = ""
    dev: str = ""
    table: str = "main"
    protocol: str = ""
    scope: str = "global"
    prefsrc: str = ""
    pref: str = ""  # IPv6 only
    flags: tuple[str, ...] = ()
    metric: int = 0
    metrics: tuple[dict[str, Any], ...] = ()


class _NeighbourInfo(msgspec.Struct, frozen=True):
    dst: str = ""
    dev: str = ""
    lladdr: str = ""
    state: tuple[str, ...] = ()


def parse_interfaces(links: bytes, routes: bytes, neighbours: bytes) -> tuple[Interface, ...]:
    """Parse what `addr show`, `route show table all` and `neigh show` say, each as JSON with details.

    Loopback, our own taps and interfaces without any address (the kernel's fallback tunnels, those that are not set
    up yet) are left out. Raises NetworkError for an interface of a kind that no guest can be given.
    """
    try:
        found_links = msgspec.json.decode(links or b"[]", type=tuple[_Link, ...])
        found_routes = msgspec.json.decode(routes or b"[]", type=tuple[_RouteInfo, ...])
        found_neighbours = msgspec.json.decode(neighbours or b"[]", type=tuple[_NeighbourInfo, ...])
    except msgspec.DecodeError as exc:
        raise NetworkError(f"cannot read the pod's network: ip(8) says what is not understood: {exc}") from exc
    interfaces = []
    for link in found_links:
        addresses = tuple(
            Address(info.local, info.prefixlen)
            for info in link.addr_info
            if info.local and info.scope != "host" and not info.dadfailed
        )
        if "LOOPBACK" in link.flags or not addresses or TAP_NAME.fullmatch(link.ifname):
            continue
        own_routes = _routes_of(link.ifname, found_routes)
        interfaces.append(
            Interface(
                index=link.ifindex,
                name=link.ifname,
                kind=_kind_of(link),
                mac=link.address,
                mtu=link.mtu,
                noarp="NOARP" in link.flags,
                multi_queue=bool(link.linkinfo.info_data.get("multi_queue")),
                peer_index=link.link_index,
                addresses=addresses,
                routes=own_routes,
                neighbours=_neighbours_of(link.ifname, found_neighbours, own_routes),
            )
        )
    return tuple(interfaces)


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


def _routes_of(name: str, routes: tuple[_RouteInfo, ...]) -> tuple[Route, ...]:
    """Without those that the guest's kernel makes by itself; IPv4 before IPv6, each by its metric."""
    found = []
    for info in routes:
        if info.dev != name or info.table != "main" or info.type != "unicast" or info.protocol in ("kernel", "ra"):
            continue
        is_v6 = bool(info.pref) or ":" in info.dst or ":" in info.gateway
        route = Route(
            dest="" if info.dst in ("default", "0.0.0.0/0", "::/0") else info.dst,
            is_v6=is_v6,
            gateway=info.gateway,
            source=info.prefsrc,
            scope=_scope(info.scope),
            flags=RTNH_F_ONLINK if "onlink" in info.flags else 0,
            mtu=next((int(metric["mtu"]) for metric in info.metrics if isinstance(metric.get("mtu"), int)), 0),
        )
        found.append((is_v6, info.metric, route))
    return tuple(route for _, _, route in sorted(found, key=lambda entry: entry[:2]))


def _scope(name: str) -> int:
    return SCOPES[name] if name in SCOPES else int(name) if name.isdigit() else 0


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
