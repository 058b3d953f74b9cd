"""The guest's network: interfaces, routes and neighbours as the host requests them.

All containers live in the guest's own network namespace. Requests are validated here first, so that
bad input is an INVALID_ARGUMENT and never a partial change.
"""

from __future__ import annotations

import _socket
import errno
import os

from katapod.agent import log
from katapod.agent.devices import ROOT_BUS, parse_pci_path, pci_directory
from katapod.kernel.netlink import (
    CARRIED_TYPES,
    IFA_F_DEPRECATED,
    IFA_F_NOPREFIXROUTE,
    IFF_LOOPBACK,
    IFF_NOARP,
    IFF_UP,
    METRIC6,
    RTN_UNICAST,
    RTPROT_KERNEL,
    Address,
    Link,
    Netlink,
    NextHop,
    Route,
)
from katapod.rpc.pb import agent_pb2, types_pb2
from katapod.rpc.status import RpcError, StatusCode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from katapod.agent.sandbox import Agent

__all__ = ["add_arp_neighbors", "list_interfaces", "list_routes", "show_address", "update_interface", "update_routes"]

NAME_MAX = 15  # bytes: IFNAMSIZ - 1
MTU_RANGE = range(68, 65536)
POLL_S = 0.01
V4, V6 = _socket.AF_INET, _socket.AF_INET6
TEMPORARY = "katapod-swap"
LINK_LOCAL_SCOPE = 253
RTNH_F_ONLINK = 4
LINK_FLAGS = IFF_NOARP | 0x100 | 0x200 | 0x1000  # PROMISC, ALLMULTI, MULTICAST
SHOWN_ADDRESS_FLAGS = IFA_F_DEPRECATED | IFA_F_NOPREFIXROUTE
METRICS_MAX = 17  # RTAX_FASTOPEN_NO_COOKIE


def _bad(what: str) -> RpcError:
    return RpcError(StatusCode.INVALID_ARGUMENT, what)


def parse_mac(text: str) -> bytes:
    """Six bytes. Raises RpcError (INVALID_ARGUMENT)."""
    try:
        mac = bytes.fromhex(text.replace(":", ""))
    except ValueError:
        mac = b""
    if len(mac) != 6:
        raise _bad(f"cannot read the MAC address {text[:64]!r}")
    return mac


def parse_address(text: str) -> bytes:
    """Four or sixteen bytes. Raises RpcError (INVALID_ARGUMENT)."""
    try:
        return _socket.inet_pton(V6 if ":" in text else V4, text)
    except (OSError, ValueError):
        raise _bad(f"cannot read the address {text[:64]!r}") from None


def parse_prefix(text: str, address: bytes) -> int:
    """A prefix length that fits the address. Raises RpcError (INVALID_ARGUMENT)."""
    if not (text.isascii() and text.isdigit()) or len(text) > 3 or int(text) > 8 * len(address):
        raise _bad(f"cannot read the prefix length {text[:64]!r}")
    return int(text)


def parse_destination(text: str, family: int) -> tuple[int, bytes, int]:
    """ "10.0.0.0/8", or empty for the default route of `family`: (family, address, prefix length)."""
    if text in ("", "default"):
        return family, b"", 0
    host, slash, prefix = text.partition("/")
    address = parse_address(host)
    length = parse_prefix(prefix, address) if slash else 8 * len(address)
    family = V6 if len(address) == 16 else V4
    return (family, address, length) if length else (family, b"", 0)


def _check_name(name: str) -> str:
    if not name or len(name.encode()) > NAME_MAX or name in (".", "..") or any(c in "/: \t\n\0%" for c in name):
        raise _bad(f"cannot name an interface {name[:64]!r}")
    return name


async def update_interface(agent: Agent, request: agent_pb2.UpdateInterfaceRequest) -> types_pb2.Interface:
    """Set name, addresses, MTU and flags of a NIC, and bring it up or down; other addresses are removed."""
    if not request.HasField("interface"):
        raise _bad("the request has no interface")
    wanted = request.interface
    name = _check_name(wanted.name or wanted.device)
    mac = parse_mac(wanted.hwAddr) if wanted.hwAddr else b""
    if not mac and not wanted.devicePath:
        raise _bad(f"cannot find the interface {name}: neither hwAddr nor devicePath is given")
    if wanted.mtu and wanted.mtu not in MTU_RANGE:
        raise _bad(f"cannot set the MTU of {name} to {wanted.mtu}")
    addresses = [_wanted_address(entry, exact=wanted.exact) for entry in wanted.IPAddresses]
    slots = parse_pci_path(wanted.devicePath) if wanted.devicePath else []
    present = await _device_at(agent, slots, wanted.devicePath) if slots else ""
    with Netlink() as netlink:
        links = netlink.links()
        link = _find_link(links, present, mac)
        if link is None:
            raise RpcError(StatusCode.INTERNAL, f"Link not found: no interface has the address {wanted.hwAddr}")
        flags, mask = (wanted.link_flags, LINK_FLAGS) if wanted.exact else (wanted.raw_flags, IFF_NOARP)
        try:
            _rename(netlink, link, name, links)
            netlink.change_link(link.index, mtu=wanted.mtu, flags=flags, mask=mask, tx_queue_len=wanted.tx_queue_len)
            _set_ipv6(name, "accept_dad", 0)  # duplicate address detection has been done by the host's interface
            _set_ipv6(name, "addr_gen_mode", int(wanted.no_link_local))
            _set_addresses(netlink, link.index, name, addresses, keep_link_local=not wanted.no_link_local)
            netlink.change_link(link.index, up=not wanted.exact or bool(flags & IFF_UP))
        except OSError as exc:
            raise RpcError(StatusCode.INTERNAL, f"cannot set up the interface {name}: {exc.strerror}") from exc
    return wanted


def _wanted_address(entry: types_pb2.IPAddress, *, exact: bool) -> Address:
    """The interface is set later. Raises RpcError (INVALID_ARGUMENT)."""
    address = parse_address(entry.address)
    prefix = parse_prefix(entry.mask, address)
    if not exact:
        return Address(0, address, prefix)
    peer = parse_address(entry.peer) if entry.peer else b""
    broadcast = parse_address(entry.broadcast) if entry.broadcast else b""
    if (peer and len(peer) != len(address)) or len(broadcast) not in (0, 4) or entry.scope > 255:
        raise _bad(f"cannot use the address {entry.address[:64]}: its parts do not fit together")
    if len(entry.label.encode()) > NAME_MAX or "\0" in entry.label:
        raise _bad(f"cannot label an address {entry.label[:64]!r}")
    return Address(
        0,
        address,
        prefix,
        entry.scope,
        peer=peer,
        flags=entry.flags,
        metric=entry.metric,
        label=entry.label,
        broadcast=broadcast,
    )


async def _device_at(agent: Agent, slots: list[str], path: str) -> str:
    """The name of the NIC at a PCI path, once it exists. Raises RpcError (DEADLINE_EXCEEDED)."""
    limit_s = agent.options.hotplug_timeout_s
    for _ in range(max(1, int(limit_s / POLL_S))):
        directory = pci_directory(slots, ROOT_BUS)
        try:
            for entry in os.listdir(directory) if directory else ():
                if entry.startswith("virtio"):
                    return os.listdir(f"{directory}/{entry}/net")[0]
        except (OSError, IndexError):
            pass  # its driver has not finished
        await agent.loop.sleep(POLL_S)
    raise RpcError(
        StatusCode.DEADLINE_EXCEEDED, f"cannot find the interface at {path}: it did not appear within {limit_s:g} s"
    )


def _find_link(links: list[Link], name: str, mac: bytes) -> Link | None:
    """By name if that exists: interfaces with the same parent (ipvlan) share a MAC address."""
    for link in links:
        if link.name == name if name else link.mac == mac and not link.flags & IFF_LOOPBACK:
            return link
    return None


def _rename(netlink: Netlink, link: Link, name: str, links: list[Link]) -> None:
    """An interface that has the name already gets the old one in exchange. Raises OSError."""
    if link.name == name:
        return
    other = next((other for other in links if other.name == name), None)
    if other is not None:
        netlink.change_link(other.index, up=False)
        netlink.change_link(other.index, name=TEMPORARY)
    netlink.change_link(link.index, up=False)
    netlink.change_link(link.index, name=name)
    if other is not None:
        netlink.change_link(other.index, name=link.name)
        if other.flags & IFF_UP:
            netlink.change_link(other.index, up=True)


def _set_ipv6(name: str, key: str, value: int) -> None:
    try:
        with open(f"/proc/sys/net/ipv6/conf/{name}/{key}", "w") as handle:
            handle.write(str(value))
    except OSError as exc:
        log.debug(f"{name} has no IPv6: {exc.strerror}")


def _set_addresses(netlink: Netlink, index: int, name: str, wanted: list[Address], *, keep_link_local: bool) -> None:
    """Raises OSError."""
    if any(len(each.address) == 16 and each.address[0] == 0xFE for each in wanted):
        keep_link_local = False
    for present in netlink.addresses(index):
        made_by_kernel = len(present.address) == 16 and present.scope == LINK_LOCAL_SCOPE and keep_link_local
        if not made_by_kernel and not any(_same_address(present, each, name) for each in wanted):
            try:
                netlink.delete_address(present)
            except OSError as exc:
                if exc.errno != errno.EADDRNOTAVAIL:  # removed with the address to which it was secondary
                    raise
    # the kernel lists the newest IPv6 address first, and so does the host, which has read such a list
    for each in [one for one in wanted if len(one.address) == 4] + [
        one for one in wanted[::-1] if len(one.address) == 16
    ]:
        each.index = index
        netlink.add_address(each)


def _same_address(present: Address, wanted: Address, name: str) -> bool:
    """Whether an existing address can be changed to the wanted one."""
    label = "" if present.label == name else present.label
    return (present.address, present.prefix) == (wanted.address, wanted.prefix) and (
        wanted.broadcast is None  # from a host that sends no more
        or (present.peer, present.scope, label, present.broadcast, present.flags & IFA_F_NOPREFIXROUTE)
        == (wanted.peer, wanted.scope, wanted.label, wanted.broadcast, wanted.flags & IFA_F_NOPREFIXROUTE)
    )


async def update_routes(agent: Agent, request: agent_pb2.UpdateRoutesRequest) -> agent_pb2.Routes:
    """Replace the routes that the kernel has not added itself."""
    if not request.HasField("routes"):
        raise _bad("the request has no routes")
    with Netlink() as netlink:
        indexes = {link.name: link.index for link in netlink.links()}
        wanted = [(_parse_route(entry, indexes), entry) for entry in request.routes.Routes]
        # a gateway is reached by a route without one
        wanted.sort(key=lambda pair: bool(pair[0].gateway or pair[0].nexthops))
        for old in netlink.routes():
            if old.protocol != RTPROT_KERNEL:
                _delete_route(netlink, old)
        seen: dict[tuple[int, bytes, int], int] = {}
        for route, entry in wanted:
            key = (route.family, route.dest, route.prefix)
            if not entry.exact:
                # upstream's protocol has no metric: of several routes to a destination the first one wins
                route.priority = seen.get(key, 0) + (METRIC6 if route.family == V6 else 0)
                seen[key] = seen.get(key, 0) + 1
            try:
                netlink.add_route(route, append=entry.exact)
            except FileExistsError:
                log.debug(f"the kernel has added the route to {entry.dest or 'default'} itself")
            except OSError as exc:
                raise RpcError(
                    StatusCode.INTERNAL,
                    f"cannot add the route to {entry.dest or 'default'} on {entry.device} "
                    f"(gateway {entry.gateway or 'none'}): {exc.strerror}",
                ) from exc
        return _routes_message(netlink)


def _delete_route(netlink: Netlink, route: Route) -> None:
    try:
        netlink.delete_route(route)
    except ProcessLookupError:
        log.debug("a route was removed with another")


def _parse_route(entry: types_pb2.Route, indexes: dict[str, int]) -> Route:
    kind = entry.type if entry.exact else RTN_UNICAST
    nexthops = [_parse_nexthop(hop, indexes) for hop in entry.nexthops] if entry.exact else []
    if kind == RTN_UNICAST and not nexthops and entry.device not in indexes:
        raise _bad(f"cannot add the route to {entry.dest[:64] or 'default'}: no interface {entry.device[:64]!r}")
    gateway = parse_address(entry.gateway) if entry.gateway else b""
    source = parse_address(entry.source) if entry.source else b""
    family = V6 if entry.family == types_pb2.v6 or len(source) == 16 else V4
    if not entry.exact and len(gateway) == 16:
        family = V6  # upstream's runtime omits it
    family, dest, prefix = parse_destination(entry.dest, family)
    length = 16 if family == V6 else 4
    gateways = [part for part in (gateway, *(hop.gateway for hop in nexthops)) if part]
    fits = all(len(part) == length or (len(part) == 16 and entry.exact) for part in gateways)  # IPv4 via inet6 is one
    numbers = (entry.scope, entry.tos, entry.protocol, entry.preference)
    if not fits or len(source) not in (0, length) or max(numbers) > 255 or kind not in CARRIED_TYPES:
        raise _bad(f"cannot add the route to {entry.dest[:64] or 'default'}: its parts do not fit together")
    if any(number > METRICS_MAX for number in entry.metrics) or "\0" in entry.congestion:
        raise _bad(f"cannot add the route to {entry.dest[:64] or 'default'}: unknown metric")
    more = _more_of_route(entry) if entry.exact else {}
    return Route(
        family,
        dest,
        prefix,
        index=indexes.get(entry.device, 0),
        gateway=gateway,
        source=source,
        scope=entry.scope if family == V4 else 0,
        flags=entry.flags & RTNH_F_ONLINK,
        mtu=entry.mtu,
        nexthops=tuple(nexthops),
        **more,
    )


def _more_of_route(entry: types_pb2.Route) -> dict[str, Any]:
    return {
        "priority": entry.metric,
        "protocol": entry.protocol,
        "type": entry.type,
        "tos": entry.tos,
        "metrics": dict(entry.metrics),
        "congestion": entry.congestion,
        "preference": entry.preference,
    }


def _parse_nexthop(entry: types_pb2.NextHop, indexes: dict[str, int]) -> NextHop:
    if entry.device not in indexes or entry.weight not in range(1, 257):
        raise _bad(
            f"cannot use the next hop {entry.gateway[:64]} on {entry.device[:64]!r}: no such interface or weight"
        )
    gateway = parse_address(entry.gateway) if entry.gateway else b""
    return NextHop(indexes[entry.device], gateway, entry.weight, entry.flags & RTNH_F_ONLINK)


async def list_interfaces(agent: Agent, request: agent_pb2.ListInterfacesRequest) -> agent_pb2.Interfaces:
    response = agent_pb2.Interfaces()
    with Netlink() as netlink:
        addresses = netlink.addresses()
        for link in netlink.links():
            entry = response.Interfaces.add(
                device=link.name, name=link.name, mtu=link.mtu, hwAddr=":".join(f"{byte:02x}" for byte in link.mac)
            )
            entry.raw_flags = link.flags
            entry.exact = True
            entry.link_flags = link.flags & (IFF_UP | LINK_FLAGS)
            entry.tx_queue_len = link.tx_queue_len
            for address in addresses:
                if address.index == link.index:
                    entry.IPAddresses.add(
                        family=types_pb2.v6 if len(address.address) == 16 else types_pb2.v4,
                        address=show_address(address.address),
                        mask=str(address.prefix),
                        peer=show_address(address.peer),
                        flags=address.flags & SHOWN_ADDRESS_FLAGS,
                        scope=address.scope,
                        metric=address.metric,
                        label=address.label if address.label != link.name else "",
                        broadcast=show_address(address.broadcast or b""),
                    )
    return response


async def list_routes(agent: Agent, request: agent_pb2.ListRoutesRequest) -> agent_pb2.Routes:
    with Netlink() as netlink:
        return _routes_message(netlink)


def _routes_message(netlink: Netlink) -> agent_pb2.Routes:
    names = {link.index: link.name for link in netlink.links()}
    response = agent_pb2.Routes()
    for route in netlink.routes():
        response.Routes.add(
            dest=f"{show_address(route.dest)}/{route.prefix}" if route.dest else "",
            gateway=show_address(route.gateway),
            device=names.get(route.index, ""),
            source=show_address(route.source),
            scope=route.scope,
            family=types_pb2.v6 if route.family == V6 else types_pb2.v4,
            flags=route.flags,
            mtu=route.mtu,
            exact=True,
            metric=route.priority,
            type=route.type,
            tos=route.tos,
            protocol=route.protocol,
            metrics=route.metrics,
            congestion=route.congestion,
            nexthops=[
                types_pb2.NextHop(
                    gateway=show_address(hop.gateway),
                    device=names.get(hop.index, ""),
                    weight=hop.weight,
                    flags=hop.flags,
                )
                for hop in route.nexthops
            ],
            preference=route.preference,
        )
    return response


def show_address(address: bytes) -> str:
    return _socket.inet_ntop(V6 if len(address) == 16 else V4, address) if address else ""


async def add_arp_neighbors(agent: Agent, request: agent_pb2.AddARPNeighborsRequest) -> None:
    """Add permanent entries to the neighbour table."""
    if not request.HasField("neighbors"):
        raise _bad("the request has no neighbors")
    with Netlink() as netlink:
        indexes = {link.name: link.index for link in netlink.links()}
        wanted = []
        for entry in request.neighbors.ARPNeighbors:
            if entry.device not in indexes:
                raise _bad(f"cannot add a neighbour: there is no interface {entry.device[:64]!r}")
            state = entry.state or 0x80
            if state not in range(1, 0x100):
                raise _bad(f"cannot add a neighbour in the state {entry.state}")
            address, mac = parse_address(entry.toIPAddress.address), parse_mac(entry.lladdr)
            wanted.append((indexes[entry.device], address, mac, state))
        for index, address, mac, state in wanted:
            try:
                netlink.add_neighbour(index, address, mac, state=state)
            except OSError as exc:
                raise RpcError(
                    StatusCode.INTERNAL, f"cannot add the neighbour {show_address(address)}: {exc.strerror}"
                ) from exc
