"""The facts of a sandbox as a tree for people."""

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from katapod.cli.plain_output import raw
from katapod.cli.tables import shown_age
from katapod.model.inspection import (
    Confinement,
    Counters,
    GuestFacts,
    GuestProcess,
    Link,
    NetworkFacts,
    OptionPart,
    Process,
    SandboxFacts,
)
from katapod.model.plain import plain
from katapod.observe.picture import shown_bytes

__all__ = ["build_tree", "print_tree"]

_T = TypeVar("_T")

SHOWN = 40  # entries of a long list, unless all are wanted
WIDTH_PIPED = 160
CONFINED = ("vmm", "virtiofsd", "storage")  # roles of what a guest may take over
NFT_NOTE = "tc takes packets between the interface and the tap before these rules: they do not see the guest's traffic"


def print_tree(facts: SandboxFacts, *, everything: bool) -> None:
    """On standard output: as wide as the terminal, in colours there alone."""
    output = raw(sys.stdout)
    console = Console(file=output, highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console = Console(file=output, highlight=False, width=WIDTH_PIPED, color_system=None)
    console.print(build_tree(facts, everything=everything))


def _line(*parts: str | tuple[str, str]) -> Text:
    """Text of parts, each with a style or without; no part is read as markup."""
    text = Text()
    for part in parts:
        if isinstance(part, tuple):
            text.append(plain(part[0]), style=part[1])
        else:
            text.append(plain(part))
    return text


def _branch(tree: Tree, title: str, note: str = "") -> Tree:
    return tree.add(_line((title, "bold cyan"), f"  {note}" if note else ""))


def build_tree(facts: SandboxFacts, *, everything: bool = False) -> Tree:
    room = 10**9 if everything else SHOWN
    state = (facts.state, {"running": "bold green", "paused": "bold yellow"}.get(facts.state, "bold red"))
    tree = Tree(_line(("Sandbox ", "bold"), (facts.sandbox_id, "bold"), "  ", state), guide_style="dim")
    if facts.error:
        tree.add(_line(("error: ", "bold red"), facts.error))
    for missing in facts.missing:
        tree.add(_line(("not known: ", "bold yellow"), f"{missing.part}: {missing.why}"))
    _add_about(tree, facts)
    _add_containers(tree, facts)
    _add_processes(tree, facts)
    _add_parts(tree, "Command line of the VMM", facts.command_line)
    _add_parts(tree, "Kernel parameters of the guest", facts.kernel_parameters)
    _add_devices(tree, facts)
    _add_hypervisor(tree, facts, room)
    if facts.network is not None:
        _add_network(tree, facts.network)
    elif facts.state in ("running", "paused") and not any(one.part == "network" for one in facts.missing):
        _branch(tree, "Network", "none")
    _add_share(tree, facts, room)
    if facts.channel is not None:
        _branch(tree, "Agent channel", f"ttrpc by {facts.channel.kind} {facts.channel.address}")
    if facts.guest is not None:
        _add_guest(tree, facts, facts.guest, room)
    if facts.files:
        _add_list(_branch(tree, "Files on the host"), [f"{name}: {path}" for name, path in facts.files.items()], 99)
    return tree


def _add_list(branch: Tree, lines: Sequence[str], room: int) -> None:
    for line in lines[:room]:
        branch.add(_line(line))
    _add_rest(branch, len(lines) - room)


def _add_rest(branch: Tree, more: int) -> None:
    if more > 0:
        branch.add(_line((f"and {more} more (--all)", "dim")))


def _add_about(tree: Tree, facts: SandboxFacts) -> None:
    about = _branch(tree, "About")
    age = f", {shown_age(max(0.0, facts.taken_at - facts.created_at))} ago" if facts.created_at else ""
    about.add(_line(f"created {_moment(facts.created_at)}{age}"))
    about.add(_line(f"size {facts.vcpus} vCPU, {facts.memory_mib} MiB; accelerator {facts.accelerator or '?'}"))
    about.add(_line(f"clone of template {facts.template[:12]}" if facts.template else "booted, not cloned"))
    _add_list(about, [f"{key} = {value}" for key, value in facts.labels.items()], 99)
    _add_list(about, [f"cgroup {directory}" for directory in facts.cgroups], 99)


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _add_containers(tree: Tree, facts: SandboxFacts) -> None:
    branch = _branch(tree, "Containers", str(len(facts.containers)))
    for item in facts.containers:
        name = f"{item.name} " if item.name else ""
        one = branch.add(_line((f"{name}{item.container_id}", "bold"), f"  {item.state}"))
        command = " ".join(item.command)
        one.add(_line(f"{item.image or 'no image name'}: {command}"))
        if item.exit_code is not None:
            killed = ", out of memory" if item.oom_killed else ""
            one.add(_line(f"ended with {item.exit_code}{killed}, {_moment(item.finished_at)}"))
        if item.error:
            one.add(_line((item.error, "red")))


def _add_processes(tree: Tree, facts: SandboxFacts) -> None:
    if not facts.processes:
        return
    branch = _branch(tree, "Processes on the host")
    by_parent: dict[int, list[int]] = {}
    processes = {process.pid: process for process in facts.processes}
    for process in facts.processes:
        by_parent.setdefault(process.parent if process.parent in processes else 0, []).append(process.pid)

    def add(under: Tree, pid: int) -> None:
        process = processes[pid]
        stopped = ("  stopped by a signal", "bold red") if process.state == "T" else ""
        numbers = f"{shown_bytes(process.rss)} resident, {process.cpu_seconds:.1f} s of CPU"
        is_vmm = process.role == "vmm"
        role = f"{process.role} {process.program}" if process.role in ("vmm", "storage") else process.role
        one = under.add(_line((f"{role} {pid}", "bold"), f"  {numbers}", stopped))
        command = f"{process.command[0]} ... (see below)" if is_vmm else " ".join(process.command)
        one.add(_line((command, "dim")))
        if process.confinement is not None and process.role in CONFINED:
            one.add(_line(_confinement(process.user, process.confinement)))
        if len(process.threads) > 1:
            one.add(
                _line(f"{len(process.threads)} threads: ", ", ".join(_grouped(name for _, name in process.threads)))
            )
        below = [processes[child] for child in by_parent.get(pid, ())]
        _add_helpers(one, [child for child in below if child.role == "vmm-helper"], by_parent)
        for child in below:
            if child.role != "vmm-helper":
                add(one, child.pid)

    for pid in by_parent.get(0, ()):
        add(branch, pid)


def _add_helpers(under: Tree, helpers: Sequence[Process], by_parent: Mapping[int, Sequence[int]]) -> None:
    """In one line: they have the VMM's command line, and memory that is the guest's or the VMM's."""
    if not helpers:
        return
    count = f"{len(helpers)} helpers" if len(helpers) > 1 else "1 helper"
    more = sum(len(by_parent.get(helper.pid, ())) for helper in helpers)
    pids = ", ".join(str(helper.pid) for helper in helpers[:SHOWN])
    rest = f", and {len(helpers) - SHOWN} more" if len(helpers) > SHOWN else ""
    below = f"; {more} of their own" if more else ""
    seconds = sum(helper.cpu_seconds for helper in helpers)
    under.add(_line((count, "bold"), f"  {pids}{rest}{below}, {seconds:.1f} s of CPU"))


def _confinement(user: int, found: Confinement) -> str:
    count = len(found.capabilities)
    parts = [f"user {user}", f"{count} capabilities" if count > 1 else "1 capability" if count else "no capability"]
    if found.no_new_privileges:
        parts.append("no new privileges")
    parts.append("system calls filtered" if found.seccomp else "all system calls")
    if found.namespaces:
        parts.append(f"its own {' '.join(found.namespaces)}")
    return ", ".join(parts)


def _grouped(names: Iterable[str]) -> list[str]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return [name if count == 1 else f"{name} ({count})" for name, count in counts.items()]


def _add_parts(tree: Tree, title: str, parts: tuple[OptionPart, ...]) -> None:
    if not parts:
        return
    branch = _branch(tree, title)
    for part in parts:
        one = branch.add(_line((part.part, "bold"), "  ", (part.meaning, "dim" if part.known else "yellow")))
        for detail in part.details:
            one.add(_line(detail.part, "  ", (detail.meaning, "dim" if detail.known else "yellow")))


def _add_devices(tree: Tree, facts: SandboxFacts) -> None:
    if not facts.devices:
        return
    branch = _branch(tree, "Devices on record")
    for device in facts.devices:
        words = [
            "" if device.slot is None else f"slot {device.slot}",
            f"{device.size_mib} MiB" if device.size_mib else "",
            f"host {device.host}" if device.host else "",
            f"over {device.backing}" if device.backing else "",
            "read-only" if device.read_only else "",
            f"guest path {device.guest_path}" if device.guest_path else "",
        ]
        lacks = ("  the VMM does not have it", "bold red") if device.in_vmm is False else ""
        branch.add(_line((f"{device.kind} {device.name}", "bold"), "  ", "  ".join(filter(None, words)), lacks))


def _add_hypervisor(tree: Tree, facts: SandboxFacts, room: int) -> None:
    hypervisor = facts.hypervisor
    if hypervisor is None:
        return
    branch = _branch(tree, "Virtual machine", f"{hypervisor.name} {hypervisor.version}, {hypervisor.accelerator}")
    branch.add(_line(f"status {hypervisor.status}"))
    memory = f"memory {shown_bytes(hypervisor.base_memory)}, and {shown_bytes(hypervisor.plugged_memory)} plugged in"
    branch.add(_line(memory))
    threads = ", ".join(f"{cpu.number} is thread {cpu.thread}" for cpu in hypervisor.cpus)
    branch.add(_line(f"vCPU {threads}"))
    devices = branch.add(_line("devices")) if hypervisor.devices else branch
    for device in hypervisor.devices:
        where = f"guest path {device.guest_path}" if device.guest_path else ""
        words = [device.pci, device.device_id, device.driver, device.what, where]
        origin = (f"  {device.origin}", "green" if device.origin == "hot-plug" else "dim")
        devices.add(_line("  ".join(word for word in words if word), origin))
    if hypervisor.disks:
        disks = branch.add(_line("disks"))
        for disk in hypervisor.disks:
            way = "read-only" if disk.read_only else "read and write"
            counts = f"read {shown_bytes(disk.read_bytes)}, written {shown_bytes(disk.written_bytes)}"
            head = f"  {disk.form}, {shown_bytes(disk.size)}, {way}; {counts}"
            one = disks.add(_line((disk.device_id, "bold"), head))
            one.add(_line(f"host {disk.file}" + (f", over {disk.backing}" if disk.backing else "")))
            one.add(_line(f"guest disk at {disk.guest_path}" + (f", {disk.guest_mount}" if disk.guest_mount else "")))


def _counted(counters: Counters) -> str:
    text = (
        f"rx {counters.rx_packets} packets, {shown_bytes(counters.rx_bytes)}; "
        f"tx {counters.tx_packets} packets, {shown_bytes(counters.tx_bytes)}"
    )
    dropped = counters.rx_dropped + counters.tx_dropped
    return f"{text}; {dropped} dropped" if dropped else text


def _add_network(tree: Tree, network: NetworkFacts) -> None:
    branch = _branch(tree, "Network", f"namespace {network.inode}, {network.netns}")
    members: dict[str, list[int]] = {}
    for member in network.members:
        members.setdefault(member.command, []).append(member.pid)
    listed = ", ".join(f"{name} {' '.join(map(str, pids[:SHOWN]))}" for name, pids in members.items())
    branch.add(_line(f"processes in it: {listed or 'none'}"))
    for link in network.links:
        title = f"{link.name}@if{link.peer_index}" if link.peer_index else link.name
        one = branch.add(_line((title, "bold"), f"  {link.kind}, index {link.index}, {link.mac}, mtu {link.mtu}"))
        _add_list(one, link.addresses, 99)
        one.add(_line(_counted(link.counters)))
        for nic in network.nics:
            if nic.interface == link.name and nic.peer is not None:
                one.add(_line(f"its other end, {nic.peer_where}: ", *_peer_text(nic.peer)))
        for redirect in network.redirects:
            if redirect.source == link.name:
                way = f"tc at ingress: {redirect.kind}, {redirect.match or '?'}: to {redirect.target}"
                counts = f"{redirect.packets} packets, {shown_bytes(redirect.bytes)}, {redirect.dropped} dropped"
                one.add(_line((way, "magenta"), f"; {counts}"))
    if network.qdiscs:
        _add_list(branch.add(_line("qdiscs")), network.qdiscs, 99)
    _add_list(branch.add(_line("routes (of the namespace; the guest has its own)")), network.routes, 99)
    rules = branch.add(_line("nft rules  ", (NFT_NOTE, "dim")))
    _add_list(rules, network.nft.splitlines() or ["none"], 99)


def _peer_text(peer: Link) -> list[str | tuple[str, str]]:
    master = f", in bridge {peer.master}" if peer.master else ""
    return [(peer.name, "bold"), f", index {peer.index}{master}; {_counted(peer.counters)}"]


def _add_share(tree: Tree, facts: SandboxFacts, room: int) -> None:
    share = facts.share
    if share is None:
        if facts.processes and not any(each.part == "share" for each in facts.missing):
            _branch(tree, "Shared directory", "none: no file of the host is shared, and no virtiofsd runs")
        return
    branch = _branch(tree, "Shared directory", f"virtio-fs, tag {share.tag}, by virtiofsd {share.virtiofsd or '?'}")
    branch.add(_line(f"host  {share.directory}"))
    branch.add(_line(f"guest {share.guest}"))
    names = {item.container_id: item.name or item.container_id[:12] for item in facts.containers}
    for mount in share.mounts[:room]:
        way = "read-only" if mount.read_only else "read and write"
        one = branch.add(_line((mount.host, "bold"), f"  {mount.fstype}, {way}"))
        one.add(_line(f"guest {mount.guest}"))
        if mount.destination:
            one.add(_line(f"container {names.get(mount.container, '?')}: {mount.destination}"))
    _add_rest(branch, len(share.mounts) - room)


def _add_guest(tree: Tree, facts: SandboxFacts, guest: GuestFacts, room: int) -> None:
    branch = _branch(tree, "Guest", "as its agent tells; it might not tell the truth")
    branch.add(_line(f"kernel {guest.kernel} ({guest.kernel_build}), host name {guest.hostname}"))
    branch.add(_line(f"agent {guest.agent}, first process {guest.init}, up {guest.uptime_s:.0f} s, {guest.cpus} CPU"))
    branch.add(
        _line(
            f"memory {shown_bytes(guest.memory_total)}, {shown_bytes(guest.memory_available)} available, "
            f"{shown_bytes(guest.memory_free)} free"
        )
    )
    links = branch.add(_line("interfaces"))
    for link in guest.links:
        shown = ", ".join(link.addresses)
        links.add(_line((link.name, "bold"), f"  {link.mac}, mtu {link.mtu}  {shown}  {_counted(link.counters)}"))
    _add_titled(
        branch,
        "routes",
        guest.routes,
        lambda one: " ".join(
            word for word in (one.destination, one.gateway and f"via {one.gateway}", f"dev {one.device}") if word
        ),
        99,
    )
    _add_titled(branch, "mounts", guest.mounts, lambda one: f"{one.source} on {one.target}  {one.fstype}", room)
    names = {item.container_id: item.name or item.container_id[:12] for item in facts.containers}

    def process_line(one: GuestProcess) -> str:
        where = f"  [{names.get(one.container, one.container[:12])}]" if one.container else ""
        return f"{one.pid:>5}  {one.state}  {shown_bytes(one.rss):>9}  {one.command}{where}"

    users = [one for one in guest.processes if not one.command.startswith("[")]
    kernel = len(guest.processes) - len(users)
    listed = guest.processes if room > SHOWN else users
    note = f", and {kernel} of the kernel" if kernel and room <= SHOWN else ""
    _add_titled(branch, f"processes{note}", listed, process_line, 10**9)
    _add_titled(
        branch, "modules", guest.modules, lambda one: f"{one.name}  {shown_bytes(one.size)}, used {one.used}", room
    )
    if guest.units:
        _add_titled(branch, "units", guest.units, lambda one: f"{one.name}  {one.active} {one.sub}  {one.what}", room)
    if guest.cut:
        branch.add(_line(("it said more than there is room for", "yellow")))


def _add_titled(branch: Tree, title: str, entries: Sequence[_T], line: Callable[[_T], str], room: int) -> None:
    one = branch.add(_line(f"{title} ({len(entries)})"))
    _add_list(one, [line(entry) for entry in entries], room)
