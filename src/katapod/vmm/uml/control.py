"""What may be asked of a User-mode Linux kernel that runs, by whoever started it and by any other process."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

from katapod.model.inspection import CpuFacts, Hypervisor, Missing
from katapod.vmm.devices import Device, Nic
from katapod.vmm.errors import VmmLinkBroken, VmmRefused
from katapod.vmm.uml.mconsole import Mconsole
from katapod.vmm.uml.nics import plug_request, unplug_request
from katapod.vmm.uml.plan import MCONSOLE, SOCKETS, argv0_of

__all__ = ["UmlControl", "connected_uml"]

RELEASE_MAX = 64
NO_DEVICE = "Device doesn't exist"  # how mconsole says ENODEV


class UmlControl:
    """A VmControl. Interfaces come and go by the kernel's management console; disks are their supervisor's."""

    def __init__(self, pid: int) -> None:
        self.mconsole = Mconsole(pid, MCONSOLE)
        self._pid = pid

    async def attach(self, device: Device) -> str:
        if not isinstance(device, Nic):
            raise VmmRefused("cannot attach the device: User-mode Linux takes it of its own supervisor only")
        await self.mconsole.ask(plug_request(device))
        return ""

    async def detach(self, device: Device) -> None:
        if not isinstance(device, Nic):
            raise VmmRefused("cannot detach the device: User-mode Linux lets go of it for its own supervisor only")
        try:
            await self.mconsole.ask(unplug_request(device))
        except VmmRefused as exc:
            if NO_DEVICE not in str(exc):
                raise

    async def settle(self, device: Device) -> bool:
        """Whoever changes them does so at once, or not at all."""
        return True

    def expect_memory(self, last: int) -> "asyncio.Future[str]":
        return asyncio.get_running_loop().create_future()

    async def resize_disk(self, disk_id: str, size: int) -> None:
        raise VmmRefused(f"cannot resize disk {disk_id}: only the supervisor of User-mode Linux can")

    async def facts(self, limit_s: float) -> tuple[Hypervisor | None, list[Missing]]:
        try:
            version = await self.mconsole.ask("version", limit_s)
        except (VmmRefused, VmmLinkBroken) as exc:
            return None, [Missing("hypervisor", str(exc))]
        words = version.split()  # as uname(1): system, host name, release, ...
        release = words[2][:RELEASE_MAX] if len(words) > 2 else ""
        return (
            Hypervisor(
                name="User-mode Linux",
                version=release,
                status="running",
                accelerator="uml",
                cpus=(CpuFacts(0, self._pid),),
                base_memory=_memory_of(self._pid),
            ),
            [],
        )


@contextlib.asynccontextmanager
async def connected_uml(vm_dir: Path, limit_s: float) -> AsyncIterator[UmlControl]:
    """As Vmm.connect: nothing is opened before something is asked. Raises VmmLinkBroken if no such kernel runs."""
    pid = _find_kernel(vm_dir)
    if not pid:
        raise VmmLinkBroken("cannot find the kernel: it has ended")
    yield UmlControl(pid)


def _find_kernel(vm_dir: Path) -> int:
    """By its command line; as process 1 of its PID namespace, since its helpers have the same command line; and by the
    sockets in its root directory, since a kernel that was taken over can write the name of another. 0: none."""
    mark = f"{argv0_of(vm_dir)}\0".encode()
    try:
        sockets = os.stat(vm_dir / SOCKETS.name)
    except OSError:
        return 0
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError):
            if not Path(f"/proc/{entry}/cmdline").read_bytes().startswith(mark):
                continue
            status = Path(f"/proc/{entry}/status").read_text()
            ids = next((line.split() for line in status.splitlines() if line.startswith("NSpid:")), [])
            theirs = os.lstat(f"/proc/{entry}/root{SOCKETS}")
            if ids[-1:] == ["1"] and os.path.samestat(theirs, sockets):
                return int(entry)
    return 0


def _memory_of(pid: int) -> int:
    """Bytes, by the command line; 0 if it has ended."""
    with contextlib.suppress(OSError, ValueError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        return next((int(word[4:].removesuffix("M")) << 20 for word in words if word.startswith("mem=")), 0)
    return 0
