"""The network of a pod as a guest is to have it."""

import re
from enum import Enum

import msgspec
from msgspec import Struct

from katapod.model.errors import KatapodError

__all__ = [
    "Address",
    "Interface",
    "InterfaceKind",
    "Interworking",
    "Neighbour",
    "NextHop",
    "PodNetworkFacts",
    "NetworkError",
    "NicRecord",
    "NetworkRecord",
    "Route",
    "TAP_NAME",
]

TAP_NAME = re.compile(r"tap\d+_kata")  # what is ours in a pod's namespace
RTNH_F_ONLINK = 4
RTN_UNICAST, RTPROT_STATIC = 1, 4
NUD_PERMANENT = 0x80
IFA_F_DEPRECATED, IFA_F_NOPREFIXROUTE = 0x20, 0x200
LINK_FLAGS = {"UP": 0x1, "NOARP": 0x80, "PROMISC": 0x100, "ALLMULTI": 0x200, "MULTICAST": 0x1000}
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


class Address(Struct, frozen=True):
    """`peer` is the other end of a point-to-point link, which the prefix length is of then; `flags` IFA_F_*."""

    address: str
    prefix: int
    peer: str = ""
    flags: int = 0
    scope: int = 0
    metric: int = 0  # of the route that the kernel makes for it
    label: str = ""
    broadcast: str = ""

    @property
    def is_v6(self) -> bool:
        return ":" in self.address

    def __str__(self) -> str:
        return f"{self.address}/{self.prefix}"


class NextHop(Struct, frozen=True):
    device: str
    gateway: str = ""
    weight: int = 1
    flags: int = 0


class Route(Struct, frozen=True):
    """`dest` is empty for the default route, otherwise ADDRESS/PREFIX; `mtu` 0 means the interface's.

    Numbers as in linux/rtnetlink.h. A route with `nexthops` has no gateway and no interface of its own, one of a type
    such as blackhole has none of the three.
    """

    dest: str
    is_v6: bool
    gateway: str = ""
    source: str = ""
    scope: int = 0
    flags: int = 0
    mtu: int = 0
    metric: int = 0
    type: int = RTN_UNICAST
    tos: int = 0
    protocol: int = RTPROT_STATIC
    metrics: tuple[tuple[int, int], ...] = ()
    congestion: str = ""
    nexthops: tuple[NextHop, ...] = ()
    preference: int = 0
    device: str = ""  # where it belongs to no interface of a guest: lo, or none


class Neighbour(Struct, frozen=True):
    address: str
    mac: str
    state: int = NUD_PERMANENT


class Interface(Struct, frozen=True):
    """One interface to be given to the guest."""

    index: int
    name: str
    kind: InterfaceKind
    mac: str
    mtu: int
    flags: int = 0  # those of LINK_FLAGS that are set
    tx_queue_len: int = 0
    no_link_local: bool = False  # the kernel has made no IPv6 address for it
    multi_queue: bool = False  # of a tap
    peer_index: int = 0  # of a veth's other end, in the network namespace that that is in
    addresses: tuple[Address, ...] = ()
    routes: tuple[Route, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()


class PodNetworkFacts(Struct, frozen=True):
    """What a guest is to have. `routes` are those that belong to no single interface; `lost` says in words what is
    there and cannot be carried."""

    interfaces: tuple[Interface, ...] = ()
    routes: tuple[Route, ...] = ()
    lost: tuple[str, ...] = ()


class NicRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was made in the pod's network namespace for one interface."""

    interface: str
    tap: str
    model: str
    mac: str = ""  # of the interface, where the model takes it away for a while
    addresses: tuple[str, ...] = ()  # likewise, as ip-address(8) takes them
    shaped: bool = False


class NetworkRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`inode` tells the namespace from another that later got the same path."""

    netns: str
    inode: int
    nics: tuple[NicRecord, ...] = ()
