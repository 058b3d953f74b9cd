"""The guest as seen from inside, for inspect: read-only, and bounded in every respect.

Everything comes from /proc and netlink, and from systemctl where systemd runs.
"""

from __future__ import annotations

import os

import katapod
from katapod.rpc.pb import inspection_pb2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from katapod.agent.sandbox import Agent

__all__ = ["inspect_guest", "parse_modules", "parse_mounts", "parse_stat", "parse_units"]

ENTRIES_MAX, TEXT_MAX = 512, 512  # all together below the maximum size of a message
TURN = 32  # processes that are read before other tasks get their turn
UNITS_LIMIT_S = 4.0
PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")


class Limits:
    """Truncates lists and strings to their limits, and records that it did."""

    def __init__(self, entries: int, text: int) -> None:
        self.entries = min(entries or ENTRIES_MAX, ENTRIES_MAX)
        self.text_max = min(text or TEXT_MAX, TEXT_MAX)
        self.cut = False

    def text(self, value: str) -> str:
        if len(value) > self.text_max:
            self.cut = True
            value = value[: self.text_max]
        return value

    def list(self, values: list[Any]) -> list[Any]:
        if len(values) > self.entries:
            self.cut = True
            values = values[: self.entries]
        return values


def _read(path: str, size: int = 1 << 20) -> str:
    """The beginning of a file; empty if it does not exist. Invalid UTF-8 is replaced."""
    try:
        with open(path, "rb", buffering=0) as handle:
            parts = []
            while size > 0 and (part := handle.read(min(size, 65536))):
                parts.append(part)
                size -= len(part)
    except OSError:
        return ""
    return b"".join(parts).decode(errors="replace")


def parse_modules(text: str) -> list[tuple[str, int, int]]:
    """/proc/modules: (name, bytes, users)."""
    found = []
    for line in text.splitlines():
        fields = line.split()
        if len(fields) >= 3 and fields[1].isdigit():
            found.append((fields[0], int(fields[1]), int(fields[2]) if fields[2].isdigit() else 0))
    return found


def _unescaped(field: str) -> str:
    """Undo the kernel's mangle(): a blank is \\040."""
    if "\\" not in field:
        return field
    for char in " \t\n#\\":
        field = field.replace(f"\\{ord(char):03o}", char)
    return field


def parse_mounts(text: str) -> list[tuple[str, str, str, str]]:
    """/proc/mounts: (source, target, type, options)."""
    rows = (line.split(" ") for line in text.splitlines())
    return [(_unescaped(row[0]), _unescaped(row[1]), row[2], row[3]) for row in rows if len(row) >= 4]


def parse_stat(text: str) -> tuple[str, str, int, int] | None:
    """/proc/PID/stat: (name, state, parent, resident bytes)."""
    head, _, rest = text.rpartition(")")
    fields = rest.split()
    if len(fields) < 22:
        return None
    return head.partition("(")[2], fields[0], int(fields[1]), max(0, int(fields[21])) * PAGE_SIZE


def parse_units(text: str) -> list[tuple[str, str, str, str, str]]:
    """`systemctl list-units --plain --no-legend`: (name, load, active, sub, description)."""
    rows = (line.split(None, 4) for line in text.splitlines())
    return [(row[0], row[1], row[2], row[3], row[4] if len(row) > 4 else "") for row in rows if len(row) >= 4]


async def inspect_guest(agent: Agent, request: inspection_pb2.InspectRequest) -> inspection_pb2.InspectResponse:
    limits = Limits(request.entries_max, request.text_max)
    system = os.uname()
    memory = _meminfo()
    response = inspection_pb2.InspectResponse(
        kernel=system.release,
        kernel_build=system.version,
        kernel_parameters=_read("/proc/cmdline", 8192).strip(),
        agent=katapod.__version__,
        init=_read("/proc/1/comm", 64).strip(),
        hostname=limits.text(system.nodename),
        uptime_s=float((_read("/proc/uptime", 64).split() or ["0"])[0]),
        cpus=_online_cpus(),
        memory_total=memory.get("MemTotal", 0),
        memory_free=memory.get("MemFree", 0),
        memory_available=memory.get("MemAvailable", 0),
    )
    for name, size, used in limits.list(parse_modules(_read("/proc/modules"))):
        response.modules.add(name=limits.text(name), size=size, used=used)
    for source, target, fstype, options in limits.list(parse_mounts(_read("/proc/self/mounts"))):
        response.mounts.add(
            source=limits.text(source), target=limits.text(target), fstype=fstype, options=limits.text(options)
        )
    await _add_processes(agent, response, limits)
    _add_network(response, limits)
    await _add_units(agent, response, limits)
    response.cut = limits.cut
    return response


def _meminfo() -> dict[str, int]:
    found = {}
    for line in _read("/proc/meminfo").splitlines():
        key, _, rest = line.partition(":")
        value = rest.split()
        if value and value[0].isdigit():
            found[key] = int(value[0]) << 10
    return found


def _online_cpus() -> int:
    return sum(1 for line in _read("/proc/stat").splitlines() if line.startswith("cpu") and line[3:4].isdigit())


async def _add_processes(agent: Agent, response: Any, limits: Limits) -> None:
    groups = {container.cgroup: container_id for container_id, container in agent.containers.items()}
    pids = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
    for number, pid in enumerate(limits.list(pids)):
        if number % TURN == TURN - 1:
            await agent.loop.turn()
        stat = parse_stat(_read(f"/proc/{pid}/stat", 4096))
        if stat is None:
            continue  # it has ended
        name, state, parent, rss = stat
        command = " ".join(_read(f"/proc/{pid}/cmdline", 4 * limits.text_max).rstrip("\0").split("\0"))
        # the container's cgroup, or one below it
        cgroup = _read(f"/proc/{pid}/cgroup", 4096).strip().rpartition("::")[2]
        container = next((groups[one] for one in groups if cgroup == one or cgroup.startswith(f"{one}/")), "")
        shown = limits.text(command or f"[{name}]")
        response.processes.add(pid=pid, parent=parent, command=shown, state=state, rss=rss, container=container)


def _add_network(response: Any, limits: Limits) -> None:
    from katapod.agent.network import show_address
    from katapod.agent.stats import interfaces
    from katapod.kernel.netlink import IFF_UP, Netlink

    counters = interfaces()
    with Netlink() as netlink:
        links, addresses, routes = netlink.links(), netlink.addresses(), netlink.routes()
    names = {link.index: link.name for link in links}
    for link in limits.list(links):
        values = counters.get(link.name, [0] * 16)
        own = [f"{show_address(each.address)}/{each.prefix}" for each in addresses if each.index == link.index]
        response.links.add(
            name=limits.text(link.name),
            mac=link.mac[:6].hex(":"),
            mtu=link.mtu,
            up=bool(link.flags & IFF_UP),
            addresses=limits.list(own),
            rx_bytes=values[0], rx_packets=values[1], rx_dropped=values[3],
            tx_bytes=values[8], tx_packets=values[9], tx_dropped=values[11],
        )  # fmt: skip
    for route in limits.list(routes):
        response.routes.add(
            destination=f"{show_address(route.dest)}/{route.prefix}" if route.dest else "default",
            gateway=show_address(route.gateway),
            device=names.get(route.index, ""),
            source=show_address(route.source),
        )


async def _add_units(agent: Agent, response: Any, limits: Limits) -> None:
    """None where systemd does not run, or does not answer."""
    if not os.path.isdir("/run/systemd/system"):
        return
    from katapod.agent import program

    command = ["systemctl", "list-units", "--all", "--plain", "--no-legend", "--no-pager", "--full"]
    try:
        text = await program.run(agent.loop, command, UNITS_LIMIT_S)
    except program.ProgramError:
        return
    for name, load, active, sub, what in limits.list(parse_units(text)):
        response.units.add(name=limits.text(name), load=load, active=active, sub=sub, what=limits.text(what))
