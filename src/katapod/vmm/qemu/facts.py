"""What QEMU says of a machine, parsed as strictly as what a guest says: one that broke out would be writing it."""

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import msgspec
from msgspec import Struct

from katapod.model import inspection as facts
from katapod.model.inspection import Missing
from katapod.vmm.errors import VmmLinkBroken, VmmRefused

__all__ = ["Monitor", "ask_hypervisor", "parse_hypervisor"]

ENTRIES_MAX = 512
TEXT_MAX = 512
QUESTIONS: tuple[tuple[str, dict[str, str] | None], ...] = (
    ("query-status", None),
    ("query-version", None),
    ("query-kvm", None),
    ("query-cpus-fast", None),
    ("query-memory-size-summary", None),
    ("query-balloon", None),
    ("query-pci", None),
    ("query-block", None),
    ("query-blockstats", None),
    ("query-fdsets", None),
    ("query-memory-devices", None),
    ("qom-list", {"path": "/machine/peripheral"}),
)


class Monitor(Protocol):
    """Part of QmpClient."""

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = ..., *, limit_s: float = ...
    ) -> Any: ...


async def ask_hypervisor(
    monitor: Monitor, limit_s: float, threads: Mapping[int, int]
) -> tuple[facts.Hypervisor | None, list[Missing]]:
    """As VirtualMachine.facts. `threads`: by their numbers in QEMU's PID namespace, those in ours."""
    answers: dict[str, Any] = {}
    missing = []
    loop = asyncio.get_running_loop()
    end = loop.time() + limit_s
    for command, arguments in QUESTIONS:
        try:
            answers[command] = await monitor.execute(command, arguments, limit_s=max(0.1, end - loop.time()))
        except VmmLinkBroken as exc:
            return None, [Missing("hypervisor", str(exc))]
        except VmmRefused as exc:
            if command != "query-balloon":  # a guest that has not got as far, or has no driver
                missing.append(Missing(f"hypervisor: {command}", str(exc)))
    try:
        return parse_hypervisor(answers, threads), missing
    except (msgspec.ValidationError, RecursionError) as exc:
        return None, [Missing("hypervisor", f"cannot parse QEMU's answer: {exc}")]


class _PciId(Struct, frozen=True):
    vendor: int = 0
    device: int = 0


class _PciClass(Struct, frozen=True):
    desc: str = ""


class _PciBus(Struct, frozen=True):
    number: int = 0


class _PciBridge(Struct, frozen=True):
    bus: _PciBus = _PciBus()
    devices: list["_PciDevice"] = []


class _PciDevice(Struct, frozen=True):
    bus: int
    slot: int
    function: int
    class_info: _PciClass = _PciClass()
    id: _PciId = _PciId()
    qdev_id: str = ""
    pci_bridge: _PciBridge | None = None


class _PciRoot(Struct, frozen=True):
    devices: list[_PciDevice] = []


class _Image(Struct, frozen=True, rename="kebab"):
    virtual_size: int = 0
    format: str = ""
    filename: str = ""
    backing_filename: str = ""
    full_backing_filename: str = ""
    backing_image: "_Image | None" = None


class _Inserted(Struct, frozen=True):
    file: str = ""
    ro: bool = False
    drv: str = ""
    image: _Image = _Image()


class _Block(Struct, frozen=True):
    qdev: str = ""
    inserted: _Inserted | None = None


class _FileNode(Struct, frozen=True):
    filename: str = ""


class _Node(Struct, frozen=True):
    filename: str = ""
    file: _FileNode = _FileNode()


class _Stats(Struct, frozen=True):
    rd_bytes: int = 0
    wr_bytes: int = 0


class _BlockStats(Struct, frozen=True):
    qdev: str = ""
    stats: _Stats = _Stats()


class _HandedFd(Struct, frozen=True):
    opaque: str = ""


class _FdSet(Struct, frozen=True, rename="kebab"):
    fdset_id: int
    fds: list[_HandedFd] = []


class _Dimm(Struct, frozen=True):
    id: str = ""
    size: int = 0


class _MemoryDevice(Struct, frozen=True):
    type: str = ""
    data: _Dimm = _Dimm()


class _Child(Struct, frozen=True):
    name: str
    type: str


class _Cpu(Struct, frozen=True, rename="kebab"):
    cpu_index: int
    thread_id: int


class _VersionNumbers(Struct, frozen=True):
    major: int
    minor: int
    micro: int


class _Version(Struct, frozen=True):
    qemu: _VersionNumbers
    package: str = ""


class _Answers(Struct, frozen=True, rename="kebab"):
    """The answers, each under the name of its question."""

    query_version: _Version | None = None
    query_status: dict[str, Any] = {}
    query_kvm: dict[str, bool] = {}
    query_cpus_fast: list[_Cpu] = []
    query_memory_size_summary: dict[str, int] = {}
    query_balloon: dict[str, int] = {}
    query_pci: list[_PciRoot] = []
    query_block: list[_Block] = []
    query_blockstats: list[_BlockStats] = []
    query_fdsets: list[_FdSet] = []
    query_memory_devices: list[_MemoryDevice] = []
    qom_list: list[_Child] = []


def parse_hypervisor(answers: Mapping[str, Any], threads: Mapping[int, int]) -> facts.Hypervisor:
    """`threads` as in ask_hypervisor. Raises msgspec.ValidationError for an answer of another shape."""
    found = msgspec.convert(dict(answers), _Answers)
    children = [child for child in found.qom_list if child.type.startswith("child<")]
    drivers = {child.name: child.type.removeprefix("child<").removesuffix(">") for child in children}
    devices = [
        _pci_device(device, path, drivers) for root in found.query_pci for device, path in _walk(root.devices, "")
    ]
    seen = {device.device_id for device in devices}
    sizes = {each.data.id: each.data.size for each in found.query_memory_devices}
    for name in sorted(set(drivers) - seen):
        what = f"{sizes[name] >> 20} MiB of memory" if name in sizes else ""
        devices.append(facts.Device(device_id=_text(name), driver=_text(drivers[name]), what=what))
    version = found.query_version
    return facts.Hypervisor(
        version=f"{version.qemu.major}.{version.qemu.minor}.{version.qemu.micro} {version.package}".strip()
        if version
        else "",
        status=_text(str(found.query_status.get("status", ""))),
        accelerator="" if "query-kvm" not in answers else "kvm" if found.query_kvm.get("enabled") else "tcg",
        cpus=tuple(
            facts.CpuFacts(cpu.cpu_index, threads.get(cpu.thread_id, 0)) for cpu in found.query_cpus_fast[:ENTRIES_MAX]
        ),
        base_memory=found.query_memory_size_summary.get("base-memory", 0),
        plugged_memory=found.query_memory_size_summary.get("plugged-memory", 0),
        balloon=found.query_balloon.get("actual", 0),
        devices=tuple(devices[:ENTRIES_MAX]),
        disks=tuple(_disks(found, devices)),
    )


def _walk(devices: list[_PciDevice], above: str) -> Iterable[tuple[_PciDevice, str]]:
    """Each device with its guest path, "02/01" for what is behind the bridge in slot 2."""
    for device in devices[:ENTRIES_MAX]:
        path = f"{above}{device.slot:02x}"
        yield device, path
        if device.pci_bridge is not None and above.count("/") < 4:
            yield from _walk(device.pci_bridge.devices, f"{path}/")


_VIRTIO = {
    (0x1AF4, 0x1005): "virtio random numbers",
    (0x1AF4, 0x1044): "virtio random numbers",
    (0x1AF4, 0x1002): "virtio balloon",
    (0x1AF4, 0x1045): "virtio balloon",
    (0x1AF4, 0x1053): "virtio socket",
    (0x1AF4, 0x1012): "virtio socket",
}
"""Those that have no PCI class of their own. Source: the virtio specification, section 4.1.2."""


def _pci_device(device: _PciDevice, path: str, drivers: Mapping[str, str]) -> facts.Device:
    return facts.Device(
        device_id=_text(device.qdev_id),
        driver=_text(drivers.get(device.qdev_id, "")),
        what=_text(device.class_info.desc) or _VIRTIO.get((device.id.vendor, device.id.device), ""),
        pci=f"{device.bus:02x}:{device.slot:02x}.{device.function:x}",
        guest_path=path if device.qdev_id else "",
    )


def _disks(found: _Answers, devices: list[facts.Device]) -> Iterable[facts.Disk]:
    paths = {device.device_id: device.guest_path for device in devices}
    stats = {_device_id(each.qdev): each.stats for each in found.query_blockstats}
    handed = {f"/dev/fdset/{each.fdset_id}": each.fds[0].opaque for each in found.query_fdsets if each.fds}
    for block in found.query_block[:ENTRIES_MAX]:
        if block.inserted is None:
            continue
        device_id, image = _device_id(block.qdev), block.inserted.image
        backing = image.backing_image.filename if image.backing_image else ""
        file = _file_name(image.filename or block.inserted.file)
        counts = stats.get(device_id, _Stats())
        yield facts.Disk(
            device_id=_text(device_id),
            file=_text(handed.get(file, file)),
            backing=_text(handed.get(backing, backing) or image.full_backing_filename or image.backing_filename),
            form=_text(image.format or block.inserted.drv),
            read_only=block.inserted.ro,
            size=image.virtual_size,
            read_bytes=counts.rd_bytes,
            written_bytes=counts.wr_bytes,
            guest_path=paths.get(device_id, ""),
        )


def _file_name(name: str) -> str:
    """QEMU tells a file that is more than a name as json:{...}, with the name below `file`."""
    if not name.startswith("json:"):
        return name
    try:
        found = msgspec.json.decode(name.removeprefix("json:"), type=_Node)
    except msgspec.DecodeError:
        return name
    return found.file.filename or found.filename or name


def _device_id(qdev: str) -> str:
    """/machine/peripheral/ID/virtio-backend"""
    parts = qdev.split("/")
    return parts[3] if qdev.startswith("/machine/peripheral/") and len(parts) > 3 else qdev


def _text(text: str) -> str:
    return text[:TEXT_MAX]
