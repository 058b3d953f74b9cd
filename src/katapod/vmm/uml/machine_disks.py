"""The disks of a User-mode Linux machine: each in a place of its own, served by a daemon of its own.

The kernel's command line names all places. It finds those whose disks are there when it boots; another one is found
when the guest's agent binds the driver of its place, and is let go of when the agent unbinds it (agent/uml_disks.py).
A disk that is there at the boot is the daemon's alone; before one that comes later there is a go-between, for its size
may change (disk_link.py).
"""

import asyncio
import contextlib
import itertools
import logging
import socket
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from katapod.host.overlays import make_overlay
from katapod.host.trace import span
from katapod.tasks import beside
from katapod.vmm.devices import Disk
from katapod.vmm.errors import VmmLinkBroken, VmmRefused
from katapod.vmm.uml.disk_errors import name_of
from katapod.vmm.uml.disk_link import DiskLink, joining_disk
from katapod.vmm.uml.disk_monitor import DiskMonitor, monitored
from katapod.vmm.uml.disk_server import DiskServer, serving_disk
from katapod.vmm.uml.disks import disk_node, disk_socket, guest_path
from katapod.vmm.uml.sockets import listening
from katapod.vmm.uml.vhost_user import VhostUserFailed

__all__ = ["MachineDisks"]

log = logging.getLogger(__name__)

LET_GO_S = 10.0  # of a disk, once the agent has been asked


class _Served(Struct, eq=False):
    disk: Disk
    number: int  # that the guest's kernel should have given it
    stack: contextlib.AsyncExitStack
    link: DiskLink | None = None
    monitor: DiskMonitor | None = None


class MachineDisks:
    """`lost` is set when a daemon ends by itself: its guest would wait for the disk for ever."""

    def __init__(self, sockets: Path, vm_dir: Path, uid: int, log_path: Callable[[], Path]) -> None:
        self.lost: asyncio.Future[DiskServer] = asyncio.get_running_loop().create_future()
        self._sockets = sockets
        self._vm_dir = vm_dir
        self._uid = uid
        self._log_path = log_path  # now: the logs of a machine of the pool move
        self._served: dict[str, _Served] = {}

    @property
    def disks(self) -> list[Disk]:
        return [each.disk for each in self._served.values()]

    @property
    def named(self) -> list[tuple[str, Disk]]:
        """With the names that the guest's kernel should have given them."""
        return [(name_of(each.number), each.disk) for each in self._served.values()]

    def add(self, disk: Disk) -> str:
        """Before the kernel runs; returns where the guest finds it. Raises VmmRefused, NoSpace, KatapodError."""
        path = guest_path(disk)
        if disk.base is not None:
            make_overlay(disk.path, base=disk.base, kept=disk.kept)
        taken = {each.number for each in self._served.values()}
        number = next(number for number in itertools.count() if number not in taken)
        self._served[disk.disk_id] = _Served(disk, number, contextlib.AsyncExitStack())
        return path

    async def serve(self) -> None:
        """Those that were added: the kernel looks for them as it boots. Raises
        MissingProgram, HostLacks, CannotRun, VmmFailed."""
        for served in self._served.values():
            listener = served.stack.enter_context(listening(self._sockets / disk_socket(served.disk), self._uid))
            await self._follow(served, await self._start(served, listener))
            listener.close()

    async def plug(self, disk: Disk) -> str:
        """While the guest runs; returns where it finds it. Raises as add and serve."""
        path = self.add(disk)
        served = self._served[disk.disk_id]
        try:
            with span("serve a disk"):
                backend = self._vm_dir / f"backend-{disk.slot}.sock"
                behind = served.stack.enter_context(listening(backend, 0))
                server = await self._start(served, behind)
                assert served.monitor is not None
                try:
                    await served.monitor.greet()
                except VmmLinkBroken as exc:  # a file that it cannot use ends it
                    raise VmmRefused(f"cannot attach disk {disk.disk_id}: {server.explain_end()}") from exc
                await self._follow(served, server)
                listener = served.stack.enter_context(listening(self._sockets / disk_socket(disk), self._uid))
                served.link = await served.stack.enter_async_context(joining_disk(listener, backend))
        except BaseException:
            await self._end(served)
            raise
        return path

    async def unplug(self, disk_id: str) -> None:
        """Once the guest's kernel has let go of it. One that is not there is no error. Raises VmmRefused."""
        served = self._served.get(disk_id)
        if served is None:
            return
        if served.link is not None and served.link.joined and not served.link.ended.is_set():
            try:
                async with asyncio.timeout(LET_GO_S):
                    await served.link.ended.wait()
            except TimeoutError as exc:
                raise VmmRefused(f"cannot detach disk {disk_id}: the guest does not let go of it") from exc
        await self._end(served)

    async def resize(self, disk_id: str, size: int) -> None:
        """Raises VmmRefused, VmmLinkBroken."""
        served = self._served.get(disk_id)
        if served is None or served.link is None or served.monitor is None:
            raise VmmRefused(f"cannot resize disk {disk_id}: the guest has had it since its boot, or has it no more")
        await served.monitor.resize(disk_node(served.disk), size)
        try:
            served.link.resize(size)
        except VhostUserFailed as exc:
            raise VmmRefused(str(exc)) from exc

    async def close(self) -> None:
        for served in list(self._served.values()):
            await self._end(served)

    async def _start(self, served: _Served, listener: socket.socket) -> DiskServer:
        near, far = socket.socketpair()
        with far:
            served.monitor = await served.stack.enter_async_context(monitored(near))
            return await served.stack.enter_async_context(
                serving_disk(served.disk, listener, far, vm_dir=self._vm_dir, uid=self._uid, log_path=self._log_path())
            )

    async def _follow(self, served: _Served, server: DiskServer) -> None:
        await served.stack.enter_async_context(beside(self._watch(server), name=f"disk-{served.disk.disk_id}"))

    async def _watch(self, server: DiskServer) -> None:
        await server.wait_end()
        if not self.lost.done():
            self.lost.set_result(server)

    async def _end(self, served: _Served) -> None:
        self._served.pop(served.disk.disk_id, None)
        await served.stack.aclose()
