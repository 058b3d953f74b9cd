"""A User-mode Linux machine: keeps what is attached to it, begins with run(), and ends with its kernel."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from katapod.host.cpu_placement import CpuPlacement
from katapod.host.descendants import descendants
from katapod.host.logs import KeptPipe, kept_pipe, kept_socket, read_tail
from katapod.host.process import Child, find_program, stop_child
from katapod.host.thread_times import thread_times
from katapod.host.trace import span
from katapod.model.errors import KatapodError
from katapod.model.inspection import Hypervisor, Missing
from katapod.model.layout import CPUS_LOCK
from katapod.tasks import beside, finish
from katapod.vmm.devices import Device, Disk, Memory, Nic, SharedDirectory
from katapod.vmm.errors import VmmFailed, VmmRefused
from katapod.vmm.protocol import Channel, DiskError, VmmLogs
from katapod.vmm.spec import AGENT_PORT_NAME, CONSOLE_PORT_NAME, VmSpec
from katapod.vmm.uml.control import UmlControl
from katapod.vmm.uml.disk_errors import ConsoleWatch, disk_error_of
from katapod.vmm.uml.machine_disks import MachineDisks
from katapod.vmm.uml.plan import SHARE_PLACE, SOCKETS, FdSlot, plan_uml
from katapod.vmm.uml.process import running_kernel, serving_share

__all__ = ["UmlMachine", "standing_uml"]

log = logging.getLogger(__name__)

PANIC = 127  # how a kernel ends that has panicked: it cannot end by SIGABRT, as process 1 of its PID namespace
PANIC_MARK = "Kernel panic - not syncing: "
PANIC_BYTES = 16384  # in which a panic stands with its trace
LINE_MAX = 300
LAST_WORDS_S = 1.0  # of a kernel that has ended, until they are in its logs
SAID_LINES = 5


class UmlMachine:
    """A VirtualMachine. Its kernel starts with the first run()."""

    # long: what it is made of, each of another kind
    def __init__(
        self,
        spec: VmSpec,
        logs: VmmLogs,
        *,
        netns: Path | None,
        console: socket.socket,
        keeping_console: asyncio.Task[None],
        said_to: KeptPipe,
        placement: CpuPlacement,
    ) -> None:
        self.logs = logs
        self.stopping = False
        self.expendable = False
        self.kernel: Child | None = None
        self._spec = spec
        self._netns = netns
        self._console = console  # the kernel's end
        self._keeping_console = keeping_console
        self._said_to = said_to
        self._share: SharedDirectory | None = None
        self._sockets = spec.vm_dir / SOCKETS.name
        self._disks = MachineDisks(self._sockets, spec.vm_dir, spec.uid, self._disk_log)
        self._nics: dict[int, Nic] = {}
        self._disk_error_handler: Callable[[DiskError], None] | None = None
        self._placement = placement
        self._near: dict[Channel, socket.socket] = {}
        self._far: dict[str, socket.socket] = {}  # by the name of the guest's port
        self._started: asyncio.Future[Child] = asyncio.get_running_loop().create_future()
        self._running = contextlib.AsyncExitStack()  # what lives from the first run() to the kernel's end
        self._open_channels()

    def _open_channels(self) -> None:
        names = {Channel.AGENT: AGENT_PORT_NAME}
        if self._spec.debug_console:
            names[Channel.DEBUG_CONSOLE] = CONSOLE_PORT_NAME
        for channel, name in names.items():
            self._near[channel], self._far[name] = socket.socketpair()

    def _disk_log(self) -> Path:
        return self.logs.vmm.with_name("disks.log")

    @property
    def pid(self) -> int:
        return self.kernel.pid if self.kernel is not None else 0

    @property
    def returncode(self) -> int | None:
        return self.kernel.process.returncode if self.kernel is not None else None

    def take_channel(self, channel: Channel) -> socket.socket | None:
        return self._near.pop(channel, None)

    # -- devices

    async def attach(self, device: Device) -> str:
        match device:
            case SharedDirectory():
                self._share = device
                if self.kernel is not None:
                    await self._serve_share(device)
                return SHARE_PLACE
            case Nic():
                if self.kernel is not None:
                    await self._control().attach(device)
                self._nics[device.number] = device
            case Disk():
                return self._disks.add(device) if self.kernel is None else await self._disks.plug(device)
            case Memory():
                raise VmmRefused(f"cannot plug {device.size_mib} MiB: User-mode Linux adds no memory")
        return ""

    async def _serve_share(self, share: SharedDirectory) -> None:
        """While the guest runs, whose agent binds the driver of its place. Raises VmmRefused."""
        try:
            await self._running.enter_async_context(serving_share(self._sockets, share, self._spec.uid))
        except VmmFailed as exc:
            raise VmmRefused(str(exc)) from exc

    async def detach(self, device: Device) -> None:
        match device:
            case Disk():
                await self._disks.unplug(device.disk_id)
            case Nic():
                await self._control().detach(device)
                self._nics.pop(device.number, None)
            case _:
                await self._control().detach(device)

    async def settle(self, device: Device) -> bool:
        match device:
            case Disk():
                return any(each.disk_id == device.disk_id for each in self._disks.disks)
            case Nic():
                return device.number in self._nics
            case _:
                return device == self._share

    async def run(self) -> None:
        """Raises VmmFailed too, MissingProgram."""
        if self.kernel is not None:
            await self._control().mconsole.ask("go")
            return
        plan = plan_uml(self._spec, nics=list(self._nics.values()))
        log.debug("%s", plan.describe())
        with span("serve the disks"):
            await self._disks.serve()
        with span("start the kernel"):
            kernel = await self._running.enter_async_context(
                running_kernel(
                    plan,
                    uid=self._spec.uid,
                    placement=self._placement,
                    share=self._share,
                    ports=self._far,
                    fds={FdSlot.CONSOLE: self._console.fileno()},
                    output=self._said_to.write_end,
                    netns=self._netns,
                )
            )
        self.kernel = kernel
        self._console.close()
        self._said_to.close()
        self._started.set_result(kernel)

    # -- while it runs

    async def pause(self) -> None:
        await self._control().mconsole.ask("stop")

    def _control(self) -> UmlControl:
        if self.kernel is None:
            raise VmmRefused("cannot ask the kernel: it does not run yet")
        return UmlControl(self.kernel.pid)

    def expect_memory(self, last: int) -> "asyncio.Future[str]":
        return asyncio.get_running_loop().create_future()

    async def add_vcpus(self, count: int) -> None:
        raise KatapodError("cannot add vCPUs: User-mode Linux has one")

    async def vcpu_threads(self) -> Sequence[int]:
        """Those of the kernel and of the processes that it traces, which are the vCPU together."""
        return list(descendants(self.pid))

    def busy_s(self) -> float:
        times = [each for pid in descendants(self.pid) for each in thread_times(pid)]
        return sum(each.run_ns + each.waited_ns for each in times) / 1e9

    async def resize_disk(self, disk_id: str, size: int) -> None:
        await self._disks.resize(disk_id, size)

    async def save_state(self, path: Path) -> None:
        raise VmmRefused("cannot save the guest: User-mode Linux has no such thing")

    async def load_state(self, state_fd: int) -> None:
        raise VmmRefused("cannot load a guest: User-mode Linux has no such thing")

    async def facts(self, limit_s: float) -> tuple[Hypervisor | None, list[Missing]]:
        if self.kernel is None:
            return None, [Missing("hypervisor", "its kernel does not run yet")]
        return await self._control().facts(limit_s)

    def on_disk_error(self, handler: Callable[[DiskError], None]) -> None:
        self._disk_error_handler = handler

    def take_disk_error(self, name: str, writing: bool) -> None:
        """The guest's kernel has told of an error of a disk. It runs on, unless that ends the sandbox."""
        error = disk_error_of(name, writing, self._disks.named)
        if error is None or self._disk_error_handler is None or self.kernel is None or self.returncode is not None:
            return
        if error.stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.kernel.pid, signal.SIGSTOP)
        self._disk_error_handler(error)

    def expect_stop(self) -> asyncio.Future[Any]:
        """It never stops the guest by itself."""
        return asyncio.get_running_loop().create_future()

    # -- its end

    async def wait_end(self) -> str:
        kernel = await asyncio.shield(self._started)
        async with beside(kernel.process.wait(), name="kernel") as ending:
            waiting: set[asyncio.Future[Any]] = {ending, self._disks.lost}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if not ending.done():
                await stop_child(kernel, soft=False)  # the guest would wait for the disk for ever
        await kernel.process.wait()
        await asyncio.wait({self._keeping_console}, timeout=LAST_WORDS_S)  # explain_end() reads what it said
        await self._said_to.wait_end(LAST_WORDS_S)
        return kernel.describe_end()

    def explain_end(self) -> VmmFailed:
        assert self.kernel is not None
        if self._disks.lost.done():
            return self._disks.lost.result().explain_end()
        said = read_tail(self.logs.vmm, max_lines=SAID_LINES)
        console = read_tail(self.logs.console)
        text = f"User-mode Linux ended unexpectedly: {self.kernel.describe_end()}"
        if panic := _panic_in(self.logs.console):
            text += f": the guest's kernel panicked: {panic}"
        if said:
            text += f"; it said: {said}"
        if console:
            text += f"\nlast lines of the guest's console:\n{console}"
        return VmmFailed(text, returncode=self.returncode, command=" ".join(self.kernel.argv))

    async def stop(self, *, soft: bool = True) -> bool:
        """End the kernel, by SIGKILL: it has nothing that the agent has not brought to the host before, and asked by
        SIGTERM it may wait for itself."""
        self.stopping = True
        graceful = self.returncode is not None
        if self.kernel is not None:
            await stop_child(self.kernel, soft=False)
        await self._running.aclose()
        await self._disks.close()
        for sock in (*self._near.values(), *self._far.values(), self._console):
            sock.close()
        return graceful


def _panic_in(console: Path) -> str:
    """Why the kernel has panicked, before its trace; empty if it has not."""
    said = read_tail(console, max_bytes=PANIC_BYTES, max_lines=PANIC_BYTES)
    return said.rpartition(PANIC_MARK)[2].partition("\n")[0][:LINE_MAX] if PANIC_MARK in said else ""


@contextlib.asynccontextmanager
async def standing_uml(spec: VmSpec, logs: VmmLogs, *, netns: Path | None = None) -> AsyncIterator[UmlMachine]:
    """A machine whose kernel starts with run(), in the network namespace `netns` if given; stopped at the end.

    Raises MissingProgram, VmmFailed.
    """
    find_program(spec.program, package="user-mode-linux")
    async with contextlib.AsyncExitStack() as stack:
        near, far = socket.socketpair()
        stack.callback(far.close)
        watch = ConsoleWatch()
        keeping_console = await stack.enter_async_context(kept_socket(near, logs.console, logs.limit_bytes, watch.hear))
        said_to = await stack.enter_async_context(kept_pipe(logs.vmm, logs.limit_bytes))
        placement = stack.enter_context(_placement())
        vm = UmlMachine(
            spec, logs, netns=netns, console=far, keeping_console=keeping_console, said_to=said_to, placement=placement
        )
        watch.told = vm.take_disk_error
        stack.push_async_callback(_stop, vm)
        yield vm


def _placement() -> CpuPlacement:
    """From here on it sees how busy each CPU is. Raises VmmFailed."""
    try:
        return CpuPlacement(CPUS_LOCK)
    except OSError as exc:
        raise VmmFailed(f"cannot start User-mode Linux: cannot open {CPUS_LOCK}: {exc.strerror}") from exc


async def _stop(vm: UmlMachine) -> None:
    with span("stop User-mode Linux"):
        await finish(vm.stop(), name="stop-uml")
