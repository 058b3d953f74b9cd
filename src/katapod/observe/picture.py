"""The picture of a sandbox's data paths, from its facts: network, shared directory, disks, agent channel.

Three columns: the host, the pod's network namespace with the processes that carry the data, the guest. Each path is a
row from left to right. Pure: no clock, no file.
"""

import time

from katapod.model.inspection import Counters, Disk, Link, Nic, Process, RecordedDevice, SandboxFacts
from katapod.observe.svg import Canvas

__all__ = ["render_picture", "shown_bytes"]

WIDTH = 1240
LEFT, MIDDLE, RIGHT = (20, 300), (380, 470), (910, 310)  # x and width of the columns
PAD = 16
TOP = 92
ROW_GAP = 26
MOUNTS_SHOWN = 8
HOST_COLORS, MIDDLE_COLORS, GUEST_COLORS = ("#f3f4f6", "#4b5563"), ("#eff6ff", "#1d4ed8"), ("#f0fdf4", "#15803d")
NETWORK, SHARE, DISK, CHANNEL = "#7c3aed", "#b45309", "#0f766e", "#be123c"


def shown_bytes(size: int) -> str:
    """1.5 MiB"""
    value, units = float(size), ("B", "KiB", "MiB", "GiB", "TiB")
    for unit in units:
        if value < 1024 or unit == units[-1]:
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"


def render_picture(facts: SandboxFacts) -> str:
    """A whole SVG document. What is not known is left out, or said to be."""
    canvas, boxes = Canvas(), Canvas()
    y = float(TOP + 34)
    for nic in facts.network.nics if facts.network is not None else ():
        y = _draw_nic(boxes, y, facts, nic)
    if facts.share is not None:
        y = _draw_share(boxes, y, facts)
    for disk in facts.hypervisor.disks if facts.hypervisor is not None else ():
        y = _draw_disk(boxes, y, facts, disk)
    if facts.hypervisor is None or not facts.hypervisor.disks:  # a VMM that has others serve its disks knows none
        for device in facts.devices:
            if device.kind == "disk":
                y = _draw_recorded_disk(boxes, y, facts, device)
    y = _draw_channel(boxes, y, facts)
    height = y - TOP
    _draw_head(canvas, facts)
    netns = f"Network namespace {facts.network.inode}" if facts.network is not None else "No network"
    canvas.area(LEFT[0], TOP, LEFT[1], height, "Host", fill=HOST_COLORS[0], edge=HOST_COLORS[1])
    title = f"{netns}; processes"
    canvas.area(MIDDLE[0], TOP, MIDDLE[1], height, title, fill=MIDDLE_COLORS[0], edge=MIDDLE_COLORS[1])
    canvas.area(RIGHT[0], TOP, RIGHT[1], height, _guest_title(facts), fill=GUEST_COLORS[0], edge=GUEST_COLORS[1])
    canvas.extend(boxes)
    y = TOP + height + 24
    for missing in facts.missing:
        canvas.line_of_text(LEFT[0], y, f"not known: {missing.part}: {missing.why}", WIDTH - 40)
        y += 16
    return canvas.render(WIDTH, y, f"Data paths of sandbox {facts.sandbox_id}")


def _draw_head(canvas: Canvas, facts: SandboxFacts) -> None:
    names = [item.name or item.container_id[:12] for item in facts.containers]
    pod = "/".join(facts.labels[key] for key in _POD_LABELS if facts.labels.get(key))
    canvas.text(LEFT[0], 34, f"Sandbox {facts.sandbox_id}", size=17, bold=True)
    parts = [
        *([f"pod {pod}"] if pod else []),
        facts.state,
        f"{facts.vcpus} vCPU, {facts.memory_mib} MiB",
        facts.accelerator,
        "clone of a template" if facts.template else "",
        f"containers: {', '.join(names)}" if names else "",
    ]
    canvas.line_of_text(LEFT[0], 56, " \N{MIDDLE DOT} ".join(part for part in parts if part), WIDTH - 40)
    taken = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(facts.taken_at))
    canvas.text(LEFT[0], 74, f"as of {taken}; counters since each part was made", size=10, fill="#6b7280")


_POD_LABELS = ("io.kubernetes.pod.namespace", "io.kubernetes.pod.name")


def _guest_title(facts: SandboxFacts) -> str:
    return f"Guest, kernel {facts.guest.kernel[:24]}" if facts.guest is not None and facts.guest.kernel else "Guest"


def _counted(counters: Counters) -> list[str]:
    return [
        f"rx {shown_bytes(counters.rx_bytes)}, {counters.rx_packets} packets",
        f"tx {shown_bytes(counters.tx_bytes)}, {counters.tx_packets} packets",
    ]


def _draw_nic(canvas: Canvas, top: float, facts: SandboxFacts, nic: Nic) -> float:
    """bridge - veth || eth0 = tc = tap || eth0"""
    assert facts.network is not None
    links = {link.name: link for link in facts.network.links}
    inside, tap = links.get(nic.interface), links.get(nic.tap)
    bottom = top
    peer = nic.peer
    if peer is not None:
        lines = [peer.name, f"veth, peer of {nic.interface}", *_counted(peer.counters)]
        height = canvas.box(LEFT[0] + PAD, top, 268, lines)
        bottom = max(bottom, top + height)
        if peer.master:
            y = top + height + 24
            canvas.arrow(LEFT[0] + 150, top + height, LEFT[0] + 150, y, both=True, color=NETWORK)
            bottom = max(bottom, y + canvas.box(LEFT[0] + PAD, y, 268, [peer.master, "bridge"]))
    else:
        height = canvas.box(
            LEFT[0] + PAD, top, 268, ["outside", nic.peer_where or "the other end is not seen from here"]
        )
    middle = top + 32
    width = 180
    x1, x2 = MIDDLE[0] + PAD, MIDDLE[0] + MIDDLE[1] - PAD - width
    canvas.arrow(LEFT[0] + PAD + 268, middle, x1, middle, both=True, label="veth pair" if peer else "", color=NETWORK)
    bottom = max(bottom, top + canvas.box(x1, top, width, _link_lines(nic.interface, inside)))
    if nic.tap:
        bottom = max(bottom, top + canvas.box(x2, top, width, _link_lines(nic.tap, tap)))
        gap1, gap2 = x1 + width, x2
        for source, target, start, end, y in (
            (nic.interface, nic.tap, gap1, gap2, top + 30),
            (nic.tap, nic.interface, gap2, gap1, top + 68),
        ):
            found = [each for each in facts.network.redirects if (each.source, each.target) == (source, target)]
            if found:
                packets = sum(each.packets for each in found)
                canvas.arrow(start, y, end, y, label=f"tc {packets}", color=NETWORK)
                canvas.text((gap1 + gap2) / 2, y + 13, "packets", size=9, fill=NETWORK, anchor="middle")
    device = _device_of(facts, inside)
    by_tap = facts.accelerator == "uml"  # its kernel opens the tap itself: no virtio
    label = "tap" if by_tap else "virtio"
    canvas.arrow(x2 + width, middle, RIGHT[0] + PAD, middle, both=True, label=label, color=NETWORK)
    guest = next(
        (link for link in (facts.guest.links if facts.guest else ()) if inside and link.mac == inside.mac), None
    )
    lines = [guest.name if guest else nic.interface, device or ("vector device" if by_tap else "virtio-net")]
    if guest is not None:
        lines += [*guest.addresses[:3], *_counted(guest.counters)]
    return max(bottom, top + canvas.box(RIGHT[0] + PAD, top, RIGHT[1] - 2 * PAD, lines)) + ROW_GAP


def _link_lines(name: str, link: Link | None) -> list[str]:
    if link is None:
        return [name]
    title = f"{name}@if{link.peer_index}" if link.peer_index else name
    return [title, *link.addresses[:2], link.mac, *_short_counted(link.counters)]


def _short_counted(counters: Counters) -> list[str]:
    return [f"rx {counters.rx_packets}, tx {counters.tx_packets} packets"]


def _device_of(facts: SandboxFacts, link: Link | None) -> str:
    devices = facts.hypervisor.devices if facts.hypervisor is not None else ()
    nets = [device for device in devices if device.driver.startswith("virtio-net")]
    if link is None or not nets:
        return ""
    assert facts.network is not None
    names = [nic.interface for nic in facts.network.nics]
    index = names.index(link.name) if link.name in names else 0
    device = nets[min(index, len(nets) - 1)]
    return f"{device.driver} at {device.guest_path or device.pci}"


def _draw_share(canvas: Canvas, top: float, facts: SandboxFacts) -> float:
    """directory - virtiofsd - mount"""
    share = facts.share
    assert share is not None
    daemon = next((process for process in facts.processes if process.pid == share.virtiofsd), None)
    x = MIDDLE[0] + PAD
    middle = top + 22
    left = canvas.box(LEFT[0] + PAD, top, 268, ["shared directory", share.directory])
    lines = [f"virtiofsd {share.virtiofsd or '(not running)'}"]
    if daemon is not None:
        lines.append(f"{shown_bytes(daemon.rss)} resident, {daemon.cpu_seconds:.1f} s of CPU")
    width = MIDDLE[1] - 2 * PAD
    canvas.arrow(LEFT[0] + PAD + 268, middle, x, middle, both=True, label="files", color=SHARE)
    height = max(left, canvas.box(x, top, width, lines))
    canvas.arrow(x + width, middle, RIGHT[0] + PAD, middle, both=True, label="virtio-fs", color=SHARE)
    right = canvas.box(RIGHT[0] + PAD, top, RIGHT[1] - 2 * PAD, [f"{share.tag} (virtiofs)", share.guest])
    y = top + max(height, right) + 8
    names = {item.container_id: item.name or item.container_id[:12] for item in facts.containers}
    for mount in share.mounts[:MOUNTS_SHOWN]:
        canvas.line_of_text(LEFT[0] + PAD + 4, y + 12, mount.host, 260, color=SHARE)
        way = "read only" if mount.read_only else "read and write"
        canvas.line_of_text(x + 4, y + 12, f"{mount.name} ({way})", width - 8, color=SHARE)
        where = f"{names.get(mount.container, '')}:{mount.destination}" if mount.destination else mount.guest
        canvas.line_of_text(RIGHT[0] + PAD + 4, y + 12, where, RIGHT[1] - 2 * PAD - 8, color=SHARE)
        y += 16
    if (more := len(share.mounts) - MOUNTS_SHOWN) > 0:
        canvas.line_of_text(x + 4, y + 12, f"and {more} more", width - 8, color=SHARE)
        y += 16
    return y + ROW_GAP


def _draw_disk(canvas: Canvas, top: float, facts: SandboxFacts, disk: Disk) -> float:
    lines = [f"{disk.form or 'disk'} of {shown_bytes(disk.size)}", disk.file]
    if disk.backing:
        lines.append(f"over {disk.backing}")
    middle = top + 22
    height = canvas.box(LEFT[0] + PAD, top, 268, lines)
    x, width = MIDDLE[0] + PAD, MIDDLE[1] - 2 * PAD
    vmm = next((process for process in facts.processes if process.role == "vmm"), None)
    counts = f"read {shown_bytes(disk.read_bytes)}, written {shown_bytes(disk.written_bytes)}"
    way = "read only" if disk.read_only else "read and write"
    canvas.arrow(LEFT[0] + PAD + 268, middle, x, middle, both=True, label="blocks", color=DISK)
    height = max(height, canvas.box(x, top, width, [f"{disk.device_id} in {_named(vmm)}", f"{counts}, {way}"]))
    canvas.arrow(x + width, middle, RIGHT[0] + PAD, middle, both=True, label="virtio", color=DISK)
    lines = [f"disk at {disk.guest_path or '?'}", disk.guest_mount or "not mounted, or not told"]
    return top + max(height, canvas.box(RIGHT[0] + PAD, top, RIGHT[1] - 2 * PAD, lines)) + ROW_GAP


def _draw_recorded_disk(canvas: Canvas, top: float, facts: SandboxFacts, disk: RecordedDevice) -> float:
    """file - who serves it - disk"""
    daemon = next((process for process in facts.processes if process.role == "storage"), None)
    lines = ["disk", disk.host, *([f"over {disk.backing}"] if disk.backing else [])]
    middle = top + 22
    height = canvas.box(LEFT[0] + PAD, top, 268, lines)
    x, width = MIDDLE[0] + PAD, MIDDLE[1] - 2 * PAD
    way = "read only" if disk.read_only else "read and write"
    canvas.arrow(LEFT[0] + PAD + 268, middle, x, middle, both=True, label="blocks", color=DISK)
    height = max(height, canvas.box(x, top, width, [f"{disk.name} in {_named(daemon)}", way]))
    canvas.arrow(x + width, middle, RIGHT[0] + PAD, middle, both=True, label="virtio", color=DISK)
    mounts = facts.guest.mounts if facts.guest is not None else ()
    target = next((mount.target for mount in mounts if mount.source == disk.guest_path), "not mounted, or not told")
    lines = [f"disk at {disk.guest_path or '?'}", target]
    return top + max(height, canvas.box(RIGHT[0] + PAD, top, RIGHT[1] - 2 * PAD, lines)) + ROW_GAP


def _named(vmm: Process | None) -> str:
    """The program and its process."""
    return f"{vmm.program} {vmm.pid}" if vmm is not None else "the VMM"


def _draw_channel(canvas: Canvas, top: float, facts: SandboxFacts) -> float:
    supervisor = next((process for process in facts.processes if process.role in ("supervisor", "shim")), None)
    vmm = next((process for process in facts.processes if process.role == "vmm"), None)
    left = (
        [f"{supervisor.role} {supervisor.pid}", f"{shown_bytes(supervisor.rss)} resident"]
        if supervisor
        else ["supervisor", "has ended"]
    )
    height = canvas.box(LEFT[0] + PAD, top, 268, left)
    middle = top + 22
    x, width = MIDDLE[0] + PAD, MIDDLE[1] - 2 * PAD
    lines = ["VMM", "has ended"]
    if vmm is not None:
        lines = [_named(vmm), f"{shown_bytes(vmm.rss)} resident, {vmm.cpu_seconds:.1f} s of CPU"]
    height = max(height, canvas.box(x, top, width, lines))
    if supervisor is not None and vmm is not None:
        canvas.arrow(LEFT[0] + PAD + 268, middle, x, middle, both=True, label="ttrpc", color=CHANNEL)
    kind = f"{facts.channel.kind} {facts.channel.address}" if facts.channel is not None else "channel not known"
    lines = ["agent", kind]
    if facts.guest is not None:
        memory = f"{shown_bytes(facts.guest.memory_available)} of {shown_bytes(facts.guest.memory_total)} available"
        lines += [f"{len(facts.guest.processes)} processes, up {facts.guest.uptime_s:.0f} s", memory]
    if vmm is not None:
        canvas.arrow(x + width, middle, RIGHT[0] + PAD, middle, both=True, label="agent", color=CHANNEL)
    right = canvas.box(RIGHT[0] + PAD, top, RIGHT[1] - 2 * PAD, lines)
    return top + max(height, right) + PAD
