"""Hot-plug over QMP as values: the commands that add a device, and those that take it out again.

The same steps serve a VM that has not run yet (-S), a running one and a restored one.
Source: QEMU's QMP reference manual for commands and arguments.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct, structs

from katapod.vmm.block_nodes import disk_node_options
from katapod.vmm.devices import (
    MEMORY_BLOCK_MIB,
    Device,
    Disk,
    DiskSettings,
    Memory,
    Nic,
    SharedDirectory,
)
from katapod.vmm.qemu.command_line import BRIDGE_SLOT

__all__ = [
    "BRIDGE_SLOTS",
    "FileToOpen",
    "HotplugPlan",
    "QmpStep",
    "dimm_id",
    "disk_node",
    "disk_of_node",
    "fd_names",
    "more_bridge_slots",
    "on_bridge",
    "pci_path",
    "plan_device",
    "plan_disk",
    "plan_memory",
    "plan_nic_device",
    "plan_shared_directory",
    "plan_vcpus",
    "share_fd_name",
    "vhost_fd_names",
]

BRIDGE_SLOTS = range(1, 32)  # of one conventional PCI bridge; slot 0 stays free, as with an SHPC
SLOTS_PER_BRIDGE = 32  # slots are counted through: 33 is the first of the second bridge
DISK_ID_MAX = 25  # characters: QEMU's node names have 31 at most, and ours begin with NODE_PREFIX
NODE_PREFIX = "drive-"
FDS_PER_SLOT = 2  # a disk may have a base


class FileToOpen(Struct, frozen=True):
    """A file of the host that QEMU, which cannot see it, is handed as a descriptor."""

    path: Path
    read_only: bool
    direct: bool = False  # O_DIRECT: QEMU looks for a descriptor with the flags that it wants


class QmpStep(Struct, frozen=True):
    command: str
    arguments: Mapping[str, Any]
    file: FileToOpen | None = None  # whose descriptor goes with the command

    def __str__(self) -> str:
        return f"{self.command} {dict(self.arguments)}"


class HotplugPlan(Struct, frozen=True):
    """`steps` in order; `undo` has the inverse of each, in reverse order, so its last N undo the first N steps.

    `device_id` is the id whose DEVICE_DELETED ends a removal; it is empty where the guest cannot let go.
    """

    what: str
    steps: tuple[QmpStep, ...]
    undo: tuple[QmpStep, ...]
    device_id: str = ""
    guest_path: str = ""

    @property
    def removable(self) -> bool:
        return bool(self.device_id)

    def describe(self) -> str:
        return "\n".join([f"plug {self.what}", *(f"  {step}" for step in self.steps)])


def more_bridge_slots(bridges: int) -> list[int]:
    """The slots of all bridges but the first."""
    return [SLOTS_PER_BRIDGE * bridge + slot for bridge in range(1, bridges) for slot in BRIDGE_SLOTS]


def pci_path(slot: int) -> str:
    """Kata's name of a device behind a bridge: hex slots from the root bus, "02/01"."""
    bridge, own = divmod(slot, SLOTS_PER_BRIDGE)
    return f"{BRIDGE_SLOT + bridge:02x}/{own:02x}"


def on_bridge(slot: int) -> dict[str, str]:
    bridge, own = divmod(slot, SLOTS_PER_BRIDGE)
    if own not in BRIDGE_SLOTS:
        raise ValueError(f"slot {slot} does not exist on the bridge: 1 to 31 do")
    return {"bus": f"pci-bridge-{bridge}", "addr": f"{own:#x}"}


def plan_device(device: Device) -> HotplugPlan:
    """Raises ValueError for a value that no device can have."""
    match device:
        case SharedDirectory():
            return plan_shared_directory(device.tag, device.slot, queue_size=device.queue_size)
        case Disk():
            return plan_disk(device)
        case Nic():
            queues, vhost = len(device.queues), bool(device.vhost)
            return plan_nic_device(device.number, device.mac, device.slot, queues=queues, vhost=vhost)
        case Memory():
            return plan_memory(
                device.number, device.size_mib, hugepages=device.hugepages, preallocated=device.preallocated
            )


def _sectors(settings: DiskSettings) -> dict[str, Any]:
    sizes = {"logical_block_size": settings.logical_sector_bytes, "physical_block_size": settings.physical_sector_bytes}
    return {name: size for name, size in sizes.items() if size}


def _thread(settings: DiskSettings, slot: int) -> dict[str, Any]:
    return {"iothread": f"iothread{slot % settings.iothreads}"} if settings.iothreads else {}


def plan_shared_directory(tag: str, slot: int, *, queue_size: int = 1024) -> HotplugPlan:
    """A virtio-fs device, whose chardev is a connection to virtiofsd, which QEMU was handed under share_fd_name()."""
    chardev, device = f"char-{tag}", f"fs-{tag}"
    return HotplugPlan(
        what=f"shared directory {tag}",
        steps=(
            QmpStep(
                "chardev-add",
                {
                    "id": chardev,
                    "backend": {
                        "type": "socket",
                        "data": {
                            "addr": {"type": "fd", "data": {"str": share_fd_name(tag)}},
                            "server": False,
                        },
                    },
                },
            ),
            QmpStep(
                "device_add",
                {
                    "driver": "vhost-user-fs-pci",
                    "id": device,
                    "chardev": chardev,
                    "tag": tag,
                    "queue-size": queue_size,
                    **on_bridge(slot),
                },
            ),
        ),
        undo=(QmpStep("device_del", {"id": device}), QmpStep("chardev-remove", {"id": chardev})),
        device_id=device,
        guest_path=pci_path(slot),
    )


def share_fd_name(tag: str) -> str:
    return f"share-{tag}"


def plan_disk(disk: Disk) -> HotplugPlan:
    """As a virtio-blk disk. Raises ValueError for an id that QEMU's names have no room for."""
    if len(disk.disk_id) > DISK_ID_MAX:
        raise ValueError(f"cannot plug disk {disk.disk_id}: its id has more than {DISK_ID_MAX} characters")
    node, device = disk_node(disk.disk_id), f"virtio-{disk.disk_id}"
    own, below = (FDS_PER_SLOT * disk.slot + number for number in range(FDS_PER_SLOT))
    base = _handed(below) if disk.base is not None else None
    source = disk_node_options(structs.replace(disk, path=_handed(own), base=base))
    direct = disk.base is None and source.get("cache", {}).get("direct") is True
    files = {own: FileToOpen(disk.path, disk.read_only, direct)}
    if disk.base is not None:
        files[below] = FileToOpen(disk.base, read_only=True)
    return HotplugPlan(
        what=f"disk {disk.path}",
        steps=(
            *(QmpStep("add-fd", {"fdset-id": each, "opaque": str(file.path)}, file) for each, file in files.items()),
            QmpStep("blockdev-add", {"driver": source["driver"], "node-name": node, **source}),
            QmpStep(
                "device_add",
                {
                    "driver": "virtio-blk-pci",
                    "id": device,
                    "drive": node,
                    "share-rw": True,
                    **_on_errors(disk),
                    **_thread(disk.settings, disk.slot),
                    **on_bridge(disk.slot),
                },
            ),
        ),
        undo=(
            QmpStep("device_del", {"id": device}),
            QmpStep("blockdev-del", {"node-name": node}),
            *(QmpStep("remove-fd", {"fdset-id": each}) for each in reversed(files)),
        ),
        device_id=device,
        guest_path=pci_path(disk.slot),
    )


def _handed(fdset: int) -> Path:
    """What QEMU calls a file of which it was handed a descriptor in the set of this number, by add-fd."""
    return Path(f"/dev/fdset/{fdset}")


def _on_errors(disk: Disk) -> dict[str, Any]:
    """A write to an overlay that fails on the host stops the VM, which its supervisor then ends: what a guest is told
    of it comes after write(2) has succeeded, and its file system turns read-only. Of other disks, a full one of the
    host is not the guest's to handle; a broken one is, as on any machine."""
    if disk.base is not None:
        # disable-legacy: no I/O ports, which the guest would have to find room for
        return {"werror": "stop", "rerror": "report", "disable-legacy": "on"}
    return {"werror": "enospc", "rerror": "report", **_sectors(disk.settings)}


def disk_node(disk_id: str) -> str:
    return f"{NODE_PREFIX}{disk_id}"


def disk_of_node(node: str) -> str:
    return node.removeprefix(NODE_PREFIX)


def fd_names(number: int, queues: int) -> list[str]:
    """What QEMU calls the descriptors of the tap's queues, with getfd."""
    return [f"tap{number}-{queue}" for queue in range(queues)]


def vhost_fd_names(number: int, queues: int) -> list[str]:
    return [f"vhost{number}-{queue}" for queue in range(queues)]


def plan_nic_device(number: int, mac: str, slot: int, *, queues: int, vhost: bool) -> HotplugPlan:
    """A NIC whose tap queues QEMU was handed under the names of fd_names()."""
    netdev, device = f"network-{number}", f"virtio-net-{number}"
    backend: dict[str, object] = {"type": "tap", "id": netdev, "fds": ":".join(fd_names(number, queues))}
    if vhost:
        backend |= {"vhost": True, "vhostfds": ":".join(vhost_fd_names(number, queues))}
    several = {"mq": True, "vectors": 2 * queues + 2} if queues > 1 else {}
    return HotplugPlan(
        what=f"network interface {mac}",
        steps=(
            QmpStep("netdev_add", backend),
            QmpStep(
                "device_add",
                {
                    "driver": "virtio-net-pci",
                    "id": device,
                    "netdev": netdev,
                    "mac": mac,
                    "disable-legacy": "on",  # no I/O ports, which the guest would have to find room for
                    "romfile": "",  # nobody boots from it
                    **several,
                    **on_bridge(slot),
                },
            ),
        ),
        undo=(QmpStep("device_del", {"id": device}), QmpStep("netdev_del", {"id": netdev})),
        device_id=device,
        guest_path=pci_path(slot),
    )


def plan_vcpus(hotpluggable: Iterable[Mapping[str, Any]], count: int) -> HotplugPlan:
    """`count` more vCPUs, out of query-hotpluggable-cpus' answer. Raises ValueError if there are fewer."""
    free = [entry for entry in hotpluggable if "qom-path" not in entry]
    free.sort(key=lambda entry: sorted(entry["props"].items()))
    if len(free) < count:
        raise ValueError(f"cannot add {count} vCPUs: the machine has room for {len(free)} more")
    steps = []
    for entry in free[:count]:
        props = dict(entry["props"])
        name = "cpu-" + "-".join(str(props[key]) for key in sorted(props))
        steps.append(QmpStep("device_add", {"driver": entry["type"], "id": name, **props}))
    undo = tuple(QmpStep("device_del", {"id": step.arguments["id"]}) for step in reversed(steps))
    return HotplugPlan(what=f"{count} vCPUs", steps=tuple(steps), undo=undo)


def dimm_id(slot: int) -> str:
    return f"dimmmem{slot}"


def plan_memory(slot: int, size_mib: int, *, hugepages: bool = False, preallocated: bool = False) -> HotplugPlan:
    """One more DIMM of `size_mib`, a multiple of the guest's memory block. DIMMs do not come out again."""
    if size_mib <= 0 or size_mib % MEMORY_BLOCK_MIB:
        raise ValueError(f"cannot plug {size_mib} MiB: it must be a multiple of {MEMORY_BLOCK_MIB}")
    backend, device = f"mem{slot}", dimm_id(slot)
    more = ({"hugetlb": True} if hugepages else {}) | ({"prealloc": True} if hugepages or preallocated else {})
    return HotplugPlan(
        what=f"{size_mib} MiB of memory",
        steps=(
            QmpStep(
                "object-add",
                {"qom-type": "memory-backend-memfd", "id": backend, "size": size_mib << 20, "share": True, **more},
            ),
            QmpStep("device_add", {"driver": "pc-dimm", "id": device, "memdev": backend}),
        ),
        undo=(QmpStep("device_del", {"id": device}), QmpStep("object-del", {"id": backend})),
    )
