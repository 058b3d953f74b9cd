"""The pod's network in a sandbox: interfaces found, taps made, NICs plugged, the guest told."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

from msgspec import Struct, field
from msgspec.structs import replace

from katapod.host.loopback_guard import guard_loopback
from katapod.host.netns import (
    attach_nic,
    check_netns,
    detach_nics,
    hold_frames,
    netns_inode,
    open_vhost,
    scan_netns,
)
from katapod.host.taps import close_all
from katapod.host.trace import span
from katapod.model.network import (
    LINK_FLAGS,
    Interface,
    Interworking,
    NetworkError,
    NetworkRecord,
    PodNetworkFacts,
    Route,
)
from katapod.plan.network import NetworkSettings, NicPlan, plan_hold, plan_nic
from katapod.rpc.agent import AgentClient
from katapod.rpc.pb import agent_pb2, types_pb2
from katapod.sandbox.devices import Devices
from katapod.sandbox.release import ReleaseStack

__all__ = ["PodNetwork", "attach_network"]

log = logging.getLogger(__name__)

NICS_MAX = 8  # of a pod


class PodNetwork(Struct):
    """What is attached. `fds` are held for the VMM until it has its own copies; those of a tap that it opens by name,
    until the NIC goes."""

    netns: Path
    inode: int
    settings: NetworkSettings
    vcpus: int
    note: Callable[[NetworkRecord | None], None]
    routes: tuple[Route, ...] = ()  # that belong to no single interface
    nics: list[NicPlan] = field(default_factory=list)
    fds: dict[int, list[int]] = field(default_factory=dict)
    vhost_fds: dict[int, list[int]] = field(default_factory=dict)
    guest_paths: dict[int, str] = field(default_factory=dict)  # of those that are plugged, by number

    @property
    def record(self) -> NetworkRecord:
        return NetworkRecord(str(self.netns), self.inode, tuple(nic.record for nic in self.nics))

    def plan(self, interface: Interface) -> NicPlan:
        """Raises NetworkError."""
        used = {nic.number for nic in self.nics}
        number = next((number for number in range(NICS_MAX) if number not in used), -1)
        if number < 0:
            raise NetworkError(f"cannot attach the interface {interface.name}: a pod has {NICS_MAX} at most")
        return plan_nic(interface, number, self.settings, vcpus=self.vcpus)

    async def attach(self, interface: Interface) -> NicPlan:
        """Recorded first, then made. Raises KatapodError, OSError."""
        nic = self.plan(interface)
        log.debug("%s", nic.describe())
        self.nics.append(nic)
        self.note(self.record)
        try:
            self.fds[nic.number] = await attach_nic(self.netns, nic)
        except BaseException:
            self.nics.remove(nic)  # nothing is attached: what is there belongs to another sandbox
            self.note(self.record)
            raise
        try:
            if nic.vhost:
                self.vhost_fds[nic.number] = open_vhost(nic.queues)
        except BaseException:
            await self.detach(nic)
            raise
        return nic

    def let_go(self, nic: NicPlan) -> None:
        close_all(self.fds.pop(nic.number, []))
        close_all(self.vhost_fds.pop(nic.number, []))

    def enter(self, devices: Devices, nics: tuple[NicPlan, ...] | None = None) -> None:
        """Into the table of devices. Raises KatapodError if the VM has no room for them."""
        for nic in self.nics if nics is None else nics:
            devices.enter_nic(nic)

    async def plug(self, devices: Devices, nics: tuple[NicPlan, ...] | None = None) -> None:
        """Give the VMM the taps and the guest its NICs; ours are closed then. Raises VmmRefused, VmmLinkBroken."""
        for nic in self.nics if nics is None else nics:
            try:
                queues = self.fds[nic.number] if nic.owner is None else ()
                vhost = self.vhost_fds.get(nic.number, ())
                self.guest_paths[nic.number] = await devices.attach_nic(nic.number, queues, vhost)
            finally:
                if nic.owner is None:
                    self.let_go(nic)

    async def add(self, devices: Devices, nic: NicPlan) -> None:
        """While the guest runs. Raises as enter and plug."""
        self.enter(devices, (nic,))
        devices.note()
        try:
            await self.plug(devices, (nic,))
        finally:
            devices.note()

    def forget_plugged(self, number: int) -> None:
        """The guest has this NIC no more: it is not told of it. What is in the namespace stays until the interface
        goes, or the sandbox ends."""
        self.guest_paths.pop(number, None)

    async def tell_guest(self, agent: AgentClient, nics: tuple[NicPlan, ...] | None = None) -> None:
        """Interfaces side by side, then routes and neighbours side by side. Raises RpcError."""
        there = tuple(nic for nic in self.nics if nic.number in self.guest_paths)
        new = there if nics is None else tuple(nic for nic in nics if nic in there)
        with span("set up the guest's network"):
            await _all(
                agent.call("UpdateInterface", _interface_request(nic, self.guest_paths[nic.number])) for nic in new
            )
            neighbours = _neighbours_request(new)
            calls = [agent.call("UpdateRoutes", _routes_request(there, self.routes))]
            if neighbours.neighbors.ARPNeighbors:
                calls.append(agent.call("AddARPNeighbors", neighbours))
            await _all(calls)

    async def release(self) -> None:
        """Undo all in the namespace; the VMM has ended, or has let go. Raises KatapodError, OSError."""
        record, nics, self.nics = self.record, self.nics, []
        for nic in nics:
            if nic.owner is None:
                self.let_go(nic)
        try:
            await detach_nics(self.netns, record)
        finally:
            for nic in nics:
                self.let_go(nic)  # a claim outlasts its tap, or another sandbox could take that in between
        with contextlib.suppress(FileNotFoundError):  # the record has gone already
            self.note(None)  # or a later removal would undo what another sandbox has made here since

    async def detach(self, nic: NicPlan) -> None:
        """Undo one NIC that the VMM has let go of."""
        only = NetworkRecord(str(self.netns), self.inode, (nic.record,))
        if nic.owner is None:
            self.let_go(nic)
        await detach_nics(self.netns, only)
        self.let_go(nic)
        self.nics.remove(nic)
        self.note(self.record)

    async def compare(self) -> tuple[list[NicPlan], list[Interface], list[Interface]]:
        """NICs whose interface is gone, interfaces that have no NIC yet, and those that have changed since.

        What a macvtap stands on has lost its addresses to the guest, and counts as unchanged. Raises KatapodError.
        """
        if netns_inode(self.netns) != self.inode:
            return list(self.nics), [], []
        facts = self.take_routes(await scan_netns(self.netns))
        found = {interface.index: interface for interface in facts.interfaces}
        gone, changed = [], []
        for nic in self.nics:
            if nic.model is Interworking.MACVTAP:
                found.pop(nic.interface.index, None)
                continue
            now = found.pop(nic.interface.index, None)
            old = nic.interface
            if now is None or (now.name, now.mac, now.kind) != (old.name, old.mac, old.kind):
                gone.append(nic)
                if now is not None:
                    found[now.index] = now
            elif replace(now, neighbours=old.neighbours) != old:
                changed.append(now)
        return gone, list(found.values()), changed

    def take_routes(self, facts: PodNetworkFacts) -> PodNetworkFacts:
        """Keep what belongs to no interface, and say what the guest will not have."""
        self.routes = facts.routes
        for what in facts.lost:
            log.warning("the guest does not get %s of its network namespace: it cannot be carried", what)
        return facts

    async def take_change(self, interface: Interface) -> NicPlan:
        """The NIC of an interface that has other addresses, routes or another MTU now. Raises NetworkError."""
        position = next(at for at, nic in enumerate(self.nics) if nic.interface.index == interface.index)
        old = self.nics[position]
        hold = plan_hold(interface, old.tap, old.model) if old.hold else ()
        nic = self.nics[position] = replace(old, interface=interface, hold=hold)
        self.note(self.record)
        await hold_frames(self.netns, nic)
        return nic


async def _all(calls: Iterable[Coroutine[Any, Any, Any]]) -> None:
    """Side by side; the first error, once all have ended."""
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome


async def attach_network(
    netns: Path | None,
    settings: NetworkSettings,
    *,
    vcpus: int,
    note: Callable[[NetworkRecord | None], None],
    stack: ReleaseStack,
) -> PodNetwork | None:
    """Find the pod's interfaces and make their taps; their release goes to `stack`. None without a namespace.

    Raises NetworkError, UsageError for the host's own namespace, KatapodError.
    """
    if netns is None:
        return None
    with span("attach the pod's network", "network"):
        network = PodNetwork(netns, check_netns(netns), settings, vcpus, note)
        stack.push_async_callback(network.release)
        facts = network.take_routes(await scan_netns(netns))
        await guard_loopback(facts.interfaces)
        for interface in facts.interfaces:
            await network.attach(interface)
    return network


def _interface_request(nic: NicPlan, guest_path: str) -> agent_pb2.UpdateInterfaceRequest:
    interface = nic.interface
    return agent_pb2.UpdateInterfaceRequest(
        interface=types_pb2.Interface(
            device=interface.name,
            name=interface.name,
            mtu=interface.mtu,
            hwAddr=interface.mac,
            devicePath=guest_path,
            raw_flags=interface.flags & LINK_FLAGS["NOARP"],
            exact=True,
            link_flags=interface.flags,
            tx_queue_len=interface.tx_queue_len,
            no_link_local=interface.no_link_local,
            IPAddresses=[
                types_pb2.IPAddress(
                    family=types_pb2.v6 if address.is_v6 else types_pb2.v4,
                    address=address.address,
                    mask=str(address.prefix),
                    peer=address.peer,
                    flags=address.flags,
                    scope=address.scope,
                    metric=address.metric,
                    label=address.label,
                    broadcast=address.broadcast,
                )
                for address in interface.addresses
            ],
        )
    )


def _routes_request(nics: tuple[NicPlan, ...], others: tuple[Route, ...]) -> agent_pb2.UpdateRoutesRequest:
    routes = [_route_message(nic.interface.name, route) for nic in nics for route in nic.interface.routes]
    routes += [_route_message(route.device, route) for route in others]
    return agent_pb2.UpdateRoutesRequest(routes=agent_pb2.Routes(Routes=routes))


def _route_message(device: str, route: Route) -> types_pb2.Route:
    return types_pb2.Route(
        dest=route.dest,
        gateway=route.gateway,
        device=device,
        source=route.source,
        scope=route.scope,
        family=types_pb2.v6 if route.is_v6 else types_pb2.v4,
        flags=route.flags,
        mtu=route.mtu,
        exact=True,
        metric=route.metric,
        type=route.type,
        tos=route.tos,
        protocol=route.protocol,
        metrics=dict(route.metrics),
        congestion=route.congestion,
        nexthops=[
            types_pb2.NextHop(gateway=hop.gateway, device=hop.device, weight=hop.weight, flags=hop.flags)
            for hop in route.nexthops
        ],
        preference=route.preference,
    )


def _neighbours_request(nics: tuple[NicPlan, ...]) -> agent_pb2.AddARPNeighborsRequest:
    entries = [
        types_pb2.ARPNeighbor(
            toIPAddress=types_pb2.IPAddress(
                family=types_pb2.v6 if ":" in neighbour.address else types_pb2.v4, address=neighbour.address
            ),
            device=nic.interface.name,
            lladdr=neighbour.mac,
            state=neighbour.state,
        )
        for nic in nics
        for neighbour in nic.interface.neighbours
    ]
    return agent_pb2.AddARPNeighborsRequest(neighbors=agent_pb2.ARPNeighbors(ARPNeighbors=entries))
