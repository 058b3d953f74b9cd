"""Devices in the guest: found by PCI path, and waited for after a hot-plug."""

from __future__ import annotations

import os
import stat

from katapod.agent.loop import Loop
from katapod.agent.uml_disks import bind_disk, is_uml_place
from katapod.rpc.status import RpcError, StatusCode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from katapod.rpc.pb import agent_pb2, oci_pb2

__all__ = [
    "HANDLERS",
    "ROOT_BUS",
    "add_guest_devices",
    "apply_devices",
    "block_device",
    "opens_all",
    "parse_pci_path",
    "pci_directory",
    "static_nodes",
]

HANDLERS = ("blk", "mmioblk", "nvdimm")
ROOT_BUS = "/sys/devices/pci0000:00"
POLL_S = 0.01
DEV = "/dev"
NOT_DEVICES = ("pts", "shm", "mqueue", "fd", "console")  # of a container's /dev: mounts, or made by crun
LOOP_MAJOR, LOOPS = 7, 8  # as many as the driver creates when it is loaded
TTY_MAJOR, CONSOLES = 4, 64  # virtual consoles: Documentation/admin-guide/devices.txt of Linux


def parse_pci_path(text: str) -> list[str]:
    """ "02/01" to the slots ["02.0", "01.0"]. Raises RpcError (INVALID_ARGUMENT)."""
    slots = []
    for part in text.split("/"):
        slot, _, function = part.partition(".")
        try:
            number, sub = int(slot, 16), int(function or "0", 16)
        except ValueError:
            number, sub = -1, 0
        if len(slot) != 2 or not (0 <= number < 32 and 0 <= sub < 8):
            raise RpcError(StatusCode.INVALID_ARGUMENT, f"cannot read the PCI path {text[:64]!r}")
        slots.append(f"{number:02x}.{sub}")
    return slots


def pci_directory(slots: list[str], root: str) -> str | None:
    """The sysfs directory of the device, if it exists."""
    directory, bus = root, "0000:00"
    for depth, slot in enumerate(slots):
        if depth:
            try:
                bus = os.listdir(f"{directory}/pci_bus")[0]
            except (OSError, IndexError):
                return None
        directory = f"{directory}/{bus}:{slot}"
        if not os.path.isdir(directory):
            return None
    return directory


def _block_name(slots: list[str], root: str) -> str | None:
    directory = pci_directory(slots, root)
    try:
        for name in os.listdir(directory) if directory else ():
            if name.startswith("virtio"):
                return os.listdir(f"{directory}/{name}/block")[0]
    except (OSError, IndexError):
        return None
    return None


def _bound(place: str) -> str:
    """Raises RpcError (INTERNAL)."""
    try:
        name = bind_disk(place)
    except OSError as exc:
        raise RpcError(StatusCode.INTERNAL, f"cannot use the disk at {place}: {exc.strerror}") from exc
    return f"/dev/{name}" if name else ""


async def block_device(loop: Loop, source: str, timeout_s: float) -> str:
    """The node of the disk at a PCI path, at a path in /dev, or at a place of User-mode Linux, once it exists.

    Raises RpcError: INVALID_ARGUMENT, or DEADLINE_EXCEEDED after `timeout_s`; INTERNAL for a disk that cannot be had.
    """
    by_place = is_uml_place(source)
    slots = [] if by_place or source.startswith("/dev/") else parse_pci_path(source)
    for _ in range(max(1, int(timeout_s / POLL_S))):
        if by_place:
            node = _bound(source)
        elif slots:
            name = _block_name(slots, ROOT_BUS)
            node = f"/dev/{name}" if name else ""
        else:
            node = source
        if node and os.path.exists(node) and stat.S_ISBLK(os.stat(node).st_mode):
            return node
        await loop.sleep(POLL_S)
    raise RpcError(
        StatusCode.DEADLINE_EXCEEDED, f"cannot find the disk at {source}: it did not appear within {timeout_s:g} s"
    )


async def apply_devices(loop: Loop, devices: Iterable[agent_pb2.Device], spec: oci_pb2.Spec, timeout_s: float) -> None:
    """Wait for `devices` and set the guest's device numbers in the spec's entries for them. Raises RpcError."""
    for device in devices:
        if device.type == "blk":
            node = await block_device(loop, device.id or device.vm_path, timeout_s)
        elif device.type in HANDLERS:
            node = await block_device(loop, device.vm_path, timeout_s)
        else:
            raise RpcError(
                StatusCode.INVALID_ARGUMENT,
                f"cannot use the device {device.container_path}: type {device.type[:64]!r} is not supported",
            )
        numbers = os.stat(node).st_rdev
        for entry in spec.Linux.Devices:
            if entry.Path == device.container_path:
                old = entry.Major, entry.Minor
                entry.Major, entry.Minor, entry.Type = os.major(numbers), os.minor(numbers), "b"
                for rule in spec.Linux.Resources.Devices:
                    if (rule.Major, rule.Minor) == old and rule.Type == "b":
                        rule.Major, rule.Minor = entry.Major, entry.Minor
                break
        else:
            spec.Linux.Devices.add(
                Path=device.container_path, Type="b", Major=os.major(numbers), Minor=os.minor(numbers), FileMode=0o660
            )


def opens_all(resources: oci_pb2.LinuxResources) -> bool:
    """Whether the container may open every device, as a privileged one may."""
    return any(
        rule.Allow and rule.Type in ("", "a") and not (rule.Major or rule.Minor) and set("rwm") <= set(rule.Access)
        for rule in resources.Devices
    )


def add_guest_devices(spec: oci_pb2.Spec) -> None:
    """Add every device of the guest, and those whose drivers the kernel loads on open.

    Virtual consoles only where there are any: systemd in the container takes /dev/tty0 for a sign of them.
    """
    taken = {device.Path for device in spec.Linux.Devices}
    nodes = _nodes_below(DEV)
    if not _opens(f"{DEV}/tty1"):  # User-mode Linux has the nodes, and nothing behind them
        nodes = {path: node for path, node in nodes.items() if not _is_virtual_console(node[0], node[1])}
    for path, kind, major, minor in static_nodes(_text_of(f"/lib/modules/{os.uname().release}/modules.devname")):
        nodes.setdefault(f"{DEV}/{path}", (kind, os.makedev(major, minor), 0o600))
    for path, (kind, numbers, mode) in sorted(nodes.items()):
        if path not in taken:
            spec.Linux.Devices.add(
                Path=path, Type=kind, Major=os.major(numbers), Minor=os.minor(numbers), FileMode=mode
            )


def static_nodes(devname: str) -> list[tuple[str, str, int, int]]:
    """Path below /dev, type, major and minor of what modules.devname lists: "tun net/tun c10:200". Source: depmod(8).

    Includes the first loop devices, which appear only once the driver is loaded.
    """
    found = []
    for line in devname.splitlines():
        words = line.split()
        if line.startswith("#") or len(words) != 3:
            continue
        major, _, minor = words[2][1:].partition(":")
        found.append((words[1], words[2][0], int(major), int(minor)))
        if words[0] == "loop":
            found += [(f"loop{number}", "b", LOOP_MAJOR, number) for number in range(LOOPS)]
    return found


def _nodes_below(directory: str) -> dict[str, tuple[str, int, int]]:
    """Type, number and mode of each node by its path."""
    found: dict[str, tuple[str, int, int]] = {}
    for entry in os.scandir(directory):
        if directory == DEV and entry.name in NOT_DEVICES:
            continue
        status = entry.stat(follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            found |= _nodes_below(entry.path)
        elif stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
            kind = "c" if stat.S_ISCHR(status.st_mode) else "b"
            found[entry.path] = kind, status.st_rdev, stat.S_IMODE(status.st_mode)
    return found


def _is_virtual_console(kind: str, numbers: int) -> bool:
    return kind == "c" and os.major(numbers) == TTY_MAJOR and os.minor(numbers) < CONSOLES


def _opens(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK))
    except OSError:
        return False
    return True


def _text_of(path: str) -> str:
    try:
        with open(path) as handle:
            return handle.read()
    except OSError:
        return ""
