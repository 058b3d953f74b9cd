"""What a pod's network namespace looks like: interfaces with counters, filters, rules, routes, who is in it.

Reads only. Programs run in the namespace; what they say is parsed here.
"""

import asyncio
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from katapod.host.process import CannotRun, ProcessFailed, find_program, run
from katapod.model.errors import KatapodError, MissingProgram
from katapod.model.inspection import Counters, Link, Missing, NamespaceMember, NetworkFacts, Nic, Redirect
from katapod.model.network import NetworkRecord

__all__ = ["netns_members", "network_facts", "parse_links", "parse_redirects", "parse_routes"]

LIMIT_S = 5.0
NFT_MAX = 64 * 1024  # characters of a ruleset
LINKS = ("-json", "-details", "-statistics")


class _Info(Struct, frozen=True):
    info_kind: str = ""


class _AddressInfo(Struct, frozen=True):
    local: str = ""
    prefixlen: int = 0


class _Side(Struct, frozen=True):
    bytes: int = 0
    packets: int = 0
    dropped: int = 0


class _Statistics(Struct, frozen=True):
    rx: _Side = _Side()
    tx: _Side = _Side()


class _Link(Struct, frozen=True):
    ifindex: int = 0
    ifname: str = ""
    flags: list[str] = []
    mtu: int = 0
    address: str = ""
    master: str = ""
    link: str | None = None
    link_index: int = 0
    linkinfo: _Info = _Info()
    addr_info: list[_AddressInfo] = []
    stats64: _Statistics = _Statistics()


class _Route(Struct, frozen=True):
    dst: str = ""
    gateway: str = ""
    dev: str = ""
    prefsrc: str = ""
    metric: int = 0
    type: str = "unicast"
    table: str = "main"


async def network_facts(
    netns: Path, record: NetworkRecord, outside: Iterable[tuple[str, Path]]
) -> tuple[NetworkFacts | None, list[Missing]]:
    """What is in the namespace that `netns` opens. `outside`: namespaces, with what to call them, that may hold the
    other ends of veth pairs. Raises nothing that its end can cause."""
    missing: list[Missing] = []
    try:
        inode = os.stat(netns).st_ino
        links = parse_links(await _ip(netns, "address", "show"))
        routes = parse_routes(await _ip(netns, "-4", "route", "show", "table", "all", details=False))
        routes += parse_routes(await _ip(netns, "-6", "route", "show", "table", "all", details=False))
    except (OSError, KatapodError, msgspec.DecodeError) as exc:
        return None, [Missing("network", _why(exc))]
    names = [link.name for link in links]
    redirects: list[Redirect] = []
    qdiscs: tuple[str, ...] = ()
    try:
        for name in [name for nic in record.nics for name in (nic.interface, nic.tap) if name in names]:
            redirects += parse_redirects(
                name, await _tc(netns, "-json", "-s", "filter", "show", "dev", name, "ingress")
            )
        qdiscs = _qdiscs(await _tc(netns, "-json", "-s", "qdisc", "show"))
    except (KatapodError, ValueError) as exc:
        missing.append(Missing("network.redirects", _why(exc)))
    nft = ""
    try:
        nft = await _nft(netns)
    except KatapodError as exc:
        missing.append(Missing("network.nft", _why(exc)))
    others = [(name, await _links_of(path)) for name, path in outside]
    nics = []
    for nic in record.nics:
        inside = next((link for link in links if link.name == nic.interface), None)
        peer, where = _peer_of(inside, others)
        nics.append(Nic(interface=nic.interface, tap=nic.tap, model=nic.model, peer=peer, peer_where=where))
    members = await asyncio.to_thread(netns_members, inode)
    facts = NetworkFacts(
        netns=record.netns,
        inode=inode,
        members=members,
        links=links,
        nics=tuple(nics),
        redirects=tuple(redirects),
        qdiscs=qdiscs,
        routes=tuple(routes),
        nft=nft,
    )
    return facts, missing


def _why(exc: Exception) -> str:
    if isinstance(exc, MissingProgram):
        return f"{exc} ({exc.hint})"
    return str(exc)


async def _ip(netns: Path, *words: str, details: bool = True) -> bytes:
    program = find_program("ip", package="iproute2")
    flags = LINKS if details else ("-json",)
    done = await run([program, *flags, *words], netns=netns, timeout_s=LIMIT_S)
    return done.stdout.encode() or b"[]"


async def _tc(netns: Path, *words: str) -> str:
    done = await run([find_program("tc", package="iproute2"), *words], netns=netns, timeout_s=LIMIT_S)
    return done.stdout or "[]"


async def _nft(netns: Path) -> str:
    done = await run([find_program("nft", package="nftables"), "list", "ruleset"], netns=netns, timeout_s=LIMIT_S)
    text = done.stdout.strip("\n")
    return text if len(text) <= NFT_MAX else text[:NFT_MAX] + "\n(more is left out)"


async def _links_of(netns: Path) -> tuple[Link, ...]:
    try:
        return parse_links(await _ip(netns, "link", "show"))
    except (OSError, ProcessFailed, CannotRun, MissingProgram, msgspec.DecodeError):
        return ()


def _peer_of(inside: Link | None, others: Iterable[tuple[str, tuple[Link, ...]]]) -> tuple[Link | None, str]:
    """The ends of a veth pair name each other's index."""
    if inside is None or not inside.peer_index:
        return None, ""
    for where, links in others:
        for link in links:
            if link.kind == "veth" and (link.index, link.peer_index) == (inside.peer_index, inside.index):
                return link, where
    return None, ""


def parse_links(data: bytes) -> tuple[Link, ...]:
    """What `ip -json -details -statistics` says. Raises msgspec.DecodeError."""
    return tuple(
        Link(
            name=link.ifname,
            index=link.ifindex,
            kind=link.linkinfo.info_kind or ("loopback" if "LOOPBACK" in link.flags else "device"),
            peer_index=link.link_index or _index_of(link.link),
            mac=link.address,
            mtu=link.mtu,
            up="UP" in link.flags,
            master=link.master,
            addresses=tuple(f"{each.local}/{each.prefixlen}" for each in link.addr_info if each.local),
            counters=_counters(link.stats64),
        )
        for link in msgspec.json.decode(data, type=list[_Link])
        if link.ifname
    )


def _index_of(name: str | None) -> int:
    """if7, where the other end is in another namespace."""
    return int(name[2:]) if name and name.startswith("if") and name[2:].isdigit() else 0


def _counters(stats: _Statistics) -> Counters:
    rx, tx = stats.rx, stats.tx
    return Counters(rx.bytes, rx.packets, tx.bytes, tx.packets, rx.dropped, tx.dropped)


def parse_routes(data: bytes) -> list[str]:
    """Unicast routes of all tables but `local`, as ip(8) writes them. Raises msgspec.DecodeError."""
    found = []
    for route in msgspec.json.decode(data, type=list[_Route]):
        if route.type != "unicast" or route.table == "local" or not route.dst:
            continue
        words = [route.dst]
        for key, value in (("via", route.gateway), ("dev", route.dev), ("src", route.prefsrc)):
            words += [key, value] if value else []
        words += ["metric", str(route.metric)] if route.metric else []
        found.append(" ".join(words))
    return found


def parse_redirects(source: str, text: str) -> list[Redirect]:
    """The mirred actions of what `tc -json -s filter show dev SOURCE ingress` says. Raises ValueError."""
    found = []
    for entry in _objects(json.loads(text)):
        options = entry.get("options")
        for action in _objects(options.get("actions")) if isinstance(options, dict) else ():
            if action.get("kind") == "mirred" and action.get("mirred_action") == "redirect":
                stats = action.get("stats")
                counts = stats if isinstance(stats, dict) else {}
                match = options.get("match") if isinstance(options, dict) else None
                found.append(
                    Redirect(
                        source=source,
                        target=str(action.get("to_dev", "")),
                        kind=str(entry.get("kind", "")),
                        match=_match(match),
                        bytes=int(counts.get("bytes", 0)),
                        packets=int(counts.get("packets", 0)),
                        dropped=int(counts.get("drops", 0)),
                    )
                )
    return found


def _match(match: object) -> str:
    if not isinstance(match, dict):
        return ""
    value, mask = str(match.get("value", "")), str(match.get("mask", ""))
    return "everything" if mask.strip("0") == "" else f"{value}/{mask} at {match.get('off', 0)}"


def _objects(values: object) -> Iterable[Mapping[str, Any]]:
    return (value for value in values if isinstance(value, dict)) if isinstance(values, list) else ()


def _qdiscs(text: str) -> tuple[str, ...]:
    return tuple(
        f"{entry.get('dev', '')}: {entry.get('kind', '')} {entry.get('handle', '')}, "
        f"{entry.get('packets', 0)} packets, {entry.get('bytes', 0)} bytes, {entry.get('drops', 0)} dropped"
        for entry in _objects(json.loads(text))
        if entry.get("kind") not in (None, "noqueue")
    )


def netns_members(inode: int) -> tuple[NamespaceMember, ...]:
    """The processes of this host that are in the network namespace."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if os.stat(f"/proc/{name}/ns/net").st_ino == inode:
                    with open(f"/proc/{name}/comm") as handle:
                        found.append(NamespaceMember(int(name), handle.read().strip()))
            except OSError:
                continue  # it has ended
    return tuple(sorted(found, key=lambda member: member.pid))
