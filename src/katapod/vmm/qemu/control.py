"""A connection to a QEMU, by whoever has started it or by another process: a VmControl."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from katapod.host.overlays import make_overlay
from katapod.vmm.devices import Device, Disk, Nic, SharedDirectory
from katapod.vmm.errors import VmmLinkBroken, VmmRefused
from katapod.vmm.qemu.command_line import pid_file, qmp2_socket
from katapod.vmm.qemu.hotplug import dimm_id, disk_node, fd_names, plan_device, share_fd_name, vhost_fd_names
from katapod.vmm.qemu.qmp import QmpClient

if TYPE_CHECKING:
    from katapod.model.inspection import Hypervisor, Missing

__all__ = ["QemuControl", "connected_qemu", "host_threads", "short_path"]


class QemuControl:
    """What may be asked over either of QEMU's two monitors."""

    def __init__(self, qmp: QmpClient, pid: int) -> None:
        self.qmp = qmp
        self._qemu = pid

    async def attach(self, device: Device) -> str:
        plan = plan_device(device)
        if isinstance(device, Disk) and device.base is not None:
            make_overlay(device.path, base=device.base, kept=device.kept)
        if isinstance(device, SharedDirectory):
            with _connected(device.socket) as connection:
                await self.qmp.give_fd(share_fd_name(device.tag), connection.fileno())
        if isinstance(device, Nic):
            for name, fd in zip(fd_names(device.number, len(device.queues)), device.queues, strict=True):
                await self.qmp.give_fd(name, fd)
            for name, fd in zip(vhost_fd_names(device.number, len(device.vhost)), device.vhost, strict=True):
                await self.qmp.give_fd(name, fd)
        await self.qmp.plug(plan)
        return plan.guest_path

    async def detach(self, device: Device) -> None:
        await self.qmp.unplug(plan_device(device))

    async def settle(self, device: Device) -> bool:
        plan = plan_device(device)
        first, *rest = plan.undo
        there = await self.qmp.execute("qom-list", {"path": "/machine/peripheral"})
        if any(child.get("name") == first.arguments["id"] for child in there):
            return True
        for step in rest:
            with contextlib.suppress(VmmRefused):  # it is not there
                await self.qmp.execute(step.command, step.arguments)
        return False

    def expect_memory(self, last: int) -> asyncio.Future[str]:
        """By ACPI's _OST, with which the guest's kernel answers."""

        def is_it(data: Any) -> bool:
            info = data["info"]
            return bool(info["slot-type"] == "DIMM" and (info["status"] != 0 or info.get("device") == dimm_id(last)))

        def said(data: Any) -> str:
            status = data["info"]["status"]
            return f"ACPI status {status:#x}" if status else ""

        return self.qmp.expect("ACPI_DEVICE_OST", is_it, said)

    async def resize_disk(self, disk_id: str, size: int) -> None:
        await self.qmp.execute("block_resize", {"node-name": disk_node(disk_id), "size": size})

    async def facts(self, limit_s: float) -> "tuple[Hypervisor | None, list[Missing]]":
        from katapod.vmm.qemu.facts import ask_hypervisor  # only for observers

        return await ask_hypervisor(self.qmp, limit_s, host_threads(self._qemu))


@contextlib.asynccontextmanager
async def connected_qemu(vm_dir: Path, limit_s: float) -> AsyncIterator[QemuControl]:
    """Connect to the second monitor of a QEMU, which takes one process at a time. Raises VmmLinkBroken."""
    path = qmp2_socket(vm_dir)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        with short_path(path) as address:
            sock.connect(address)
    except OSError as exc:
        sock.close()
        raise VmmLinkBroken(f"cannot connect to QEMU at {path}: {exc.strerror or exc}") from exc
    qmp = await QmpClient.open(sock, limit_s=limit_s)
    try:
        yield QemuControl(qmp, _recorded_pid(vm_dir))
    finally:
        await qmp.close()


def _recorded_pid(vm_dir: Path) -> int:
    """0 if it is not known."""
    try:
        return int(pid_file(vm_dir).read_text())
    except (OSError, ValueError):
        return 0


def host_threads(pid: int) -> dict[int, int]:
    """The threads of a process: by their numbers in its PID namespace, those in ours. Empty if it has ended."""
    found = {}
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/status") as status:
                lines = (line for line in status if line.startswith("NSpid:"))
                found[int(next(lines, thread).split()[-1])] = int(thread)
    return found


@contextlib.contextmanager
def _connected(path: Path) -> Iterator[socket.socket]:
    """Raises VmmRefused."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            with short_path(path) as address:
                connection.connect(address)
        except OSError as exc:
            raise VmmRefused(f"cannot connect to {path}: {exc.strerror or exc}") from exc
        yield connection


@contextlib.contextmanager
def short_path(path: Path) -> Iterator[str]:
    """A name of the socket `path`, for us and for QEMU, while the block runs. A cache directory may lie anywhere, and
    an address has room for 107 bytes (unix(7)). Raises OSError."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/{os.getpid()}/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
