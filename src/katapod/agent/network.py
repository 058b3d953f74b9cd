"""The guest's network: interfaces, routes and neighbours as the host says them.

All containers live in the guest's own network namespace. What the host sends is checked here, once, so that bad
input is an INVALID_ARGUMENT and never half of a change.
"""

from __future__ import annotations

import _socket
import os

from katapod.agent import log
from katapod.agent.devices import ROOT_BUS, parse_pci_path, pci_folder
from katapod.kernel.netlink import IFF_LOOPBACK, IFF_NOARP, IFF_UP, METRIC6, RTPROT_KERNEL, Link, Netlink, Route
from katapod.rpc.pb import agent_pb2, types_pb2
from katapod.rpc.status import RpcError, StatusCode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from katapod.agent.sandbox import Agent

__all__ = ["add_arp_neighbors", "list_interfaces", "list_routes", "show_address", "update_interface", "update_routes"]

NAME_MAX = 15  # bytes: IFNAMSIZ - 1
MTU_RANGE = range(68, 65536)
POLL_S = 0.01
V4, V6 = _socket.AF_INET, _socket.AF_INET6
TEMPORARY = "katapod-swap"
LINK_LOCAL_SCOPE = 253
RTNH_F_ONLINK = 4


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
    """Give the NIC its name, addresses, MTU and flags, and put it up; addresses that are not named go."""
    if not request.HasField("interface"):
        raise _bad("the request has no interface")
    wanted = request.interface
    name = _check_name(wanted.name or wanted.device)
    mac = parse_mac(wanted.hwAddr) if wanted.hwAddr else b""
    if not mac and not wanted.devicePath:
        raise _bad(f"cannot find the interface {name}: neither hwAddr nor devicePath is given")
    if wanted.mtu and wanted.mtu not in MTU_RANGE:
        raise _bad(f"cannot give {name} an MTU of {wanted.mtu}")
    addresses = []
    for entry in wanted.IPAddresses:
        address = parse_address(entry.address)
        addresses.append((address, parse_prefix(entry.mask, address)))
    slots = parse_pci_path(wanted.devicePath) if wanted.devicePath else []
    present = await _device_at(agent, slots, wanted.devicePath) if slots else ""
    with Netlink() as netlink:
        links = netlink.links()
        link = _find_link(links, present, mac)
        if link is None:
            raise RpcError(StatusCode.INTERNAL, f"Link not found: no interface has the address {wanted.hwAddr}")
        noarp = bool(wanted.raw_flags & IFF_NOARP)
        try:
            _rename(netlink, link, name, links)
            netlink.change_link(link.index, mtu=wanted.mtu, noarp=noarp)
            _skip_duplicate_detection(name)
            _set_addresses(netlink, link.index, addresses)
            netlink.change_link(link.index, up=True)
        except OSError as exc:
            raise RpcError(StatusCode.INTERNAL, f"cannot set up the interface {name}: {exc.strerror}") from exc
    return wanted


async def _device_at(agent: Agent, slots: list[str], path: str) -> str:
    """The name of the NIC at a PCI path, as soon as it is there. Raises RpcError (DEADLINE_EXCEEDED)."""
    limit_s = agent.options.hotplug_timeout_s
    for _ in range(max(1, int(limit_s / POLL_S))):
        folder = pci_folder(slots, ROOT_BUS)
        try:
            for entry in os.listdir(folder) if folder else ():
                if entry.startswith("virtio"):
                    return os.listdir(f"{folder}/{entry}/net")[0]
        except (OSError, IndexError):
            pass  # its driver is not done with it
        await agent.loop.sleep(POLL_S)
    raise RpcError(
        StatusCode.DEADLINE_EXCEEDED, f"cannot find the interface at {path}: it did not appear in {limit_s:g} s"
    )


def _find_link(links: list[Link], name: str, mac: bytes) -> Link | None:
    """By name if that is known: interfaces of one parent (ipvlan) share their MAC address."""
    for link in links:
        if link.name == name if name else link.mac == mac and not link.flags & IFF_LOOPBACK:
            return link
    return None


def _rename(netlink: Netlink, link: Link, name: str, links: list[Link]) -> None:
    """Who has the name already takes the old one in exchange. Raises OSError."""
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


def _skip_duplicate_detection(name: str) -> None:
    """The host's interface holds the same address, and has looked already whether another has it."""
    try:
        with open(f"/proc/sys/net/ipv6/conf/{name}/accept_dad", "w") as handle:
            handle.write("0")
    except OSError as exc:
        log.debug(f"{name} has no IPv6: {exc.strerror}")


def _set_addresses(netlink: Netlink, index: int, wanted: list[tuple[bytes, int]]) -> None:
    """Raises OSError."""
    link_local = any(len(address) == 16 and address[0] == 0xFE for address, _ in wanted)
    for present in netlink.addresses(index):
        made_by_kernel = len(present.address) == 16 and present.scope == LINK_LOCAL_SCOPE and not link_local
        if (present.address, present.prefix) not in wanted and not made_by_kernel:
            netlink.delete_address(present)
    for address, prefix in wanted:
        netlink.add_address(index, address, prefix)


async def update_routes(agent: Agent, request: agent_pb2.UpdateRoutesRequest) -> agent_pb2.Routes:
    """Replace the routes that the kernel has not made by itself."""
    if not request.HasField("routes"):
        raise _bad("the request has no routes")
    with Netlink() as netlink:
        indexes = {link.name: link.index for link in netlink.links()}
        wanted = [(_parse_route(entry, indexes), entry) for entry in request.routes.Routes]
        wanted.sort(key=lambda pair: bool(pair[0].gateway))  # a gateway is reached over a route without one
        for old in netlink.routes():
            if old.protocol != RTPROT_KERNEL:
                _delete_route(netlink, old)
        seen: dict[tuple[int, bytes, int], int] = {}
        for route, entry in wanted:
            key = (route.family, route.dest, route.prefix)
            # the protocol knows no metric: of several routes to one destination the earlier wins
            route.priority = seen.get(key, 0) + (METRIC6 if route.family == V6 else 0)
            seen[key] = seen.get(key, 0) + 1
            try:
                netlink.add_route(route)
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
        log.debug("a route went with another")


def _parse_route(entry: types_pb2.Route, indexes: dict[str, int]) -> Route:
    if entry.device not in indexes:
        raise _bad(f"cannot add the route to {entry.dest[:64] or 'default'}: no interface {entry.device[:64]!r}")
    gateway = parse_address(entry.gateway) if entry.gateway else b""
    source = parse_address(entry.source) if entry.source else b""
    family = V6 if entry.family == types_pb2.v6 or len(gateway) == 16 or len(source) == 16 else V4
    family, dest, prefix = parse_destination(entry.dest, family)
    length = 16 if family == V6 else 4
    if any(part and len(part) != length for part in (gateway, source)) or entry.scope > 255:
        raise _bad(f"cannot add the route to {entry.dest[:64] or 'default'}: its parts do not fit together")
    return Route(
        family,
        dest,
        prefix,
        index=indexes[entry.device],
        gateway=gateway,
        source=source,
        scope=entry.scope if family == V4 else 0,
        flags=entry.flags & RTNH_F_ONLINK,
        mtu=entry.mtu,
    )


async def list_interfaces(agent: Agent, request: agent_pb2.ListInterfacesRequest) -> agent_pb2.Interfaces:
    response = agent_pb2.Interfaces()
    with Netlink() as netlink:
        addresses = netlink.addresses()
        for link in netlink.links():
            entry = response.Interfaces.add(
                device=link.name, name=link.name, mtu=link.mtu, hwAddr=":".join(f"{byte:02x}" for byte in link.mac)
            )
            entry.raw_flags = link.flags
            for address in addresses:
                if address.index == link.index:
                    entry.IPAddresses.add(
                        family=types_pb2.v6 if len(address.address) == 16 else types_pb2.v4,
                        address=show_address(address.address),
                        mask=str(address.prefix),
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
        )
    return response


def show_address(address: bytes) -> str:
    return _socket.inet_ntop(V6 if len(address) == 16 else V4, address) if address else ""


async def add_arp_neighbors(agent: Agent, request: agent_pb2.AddARPNeighborsRequest) -> None:
    """Fill the neighbour table with what does not change."""
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
