"""A running QEMU: carries out a QemuPlan, owns its descriptors, and stops it, gracefully or by SIGKILL."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from katapod.host.forbidden_calls import forbidden_call
from katapod.host.jail import Program, start_in_jail
from katapod.host.logs import KeptPipe, kept_pipe, kept_socket, read_tail
from katapod.host.process import CannotRun, Child, find_program, stop_child
from katapod.host.thread_times import thread_times
from katapod.host.trace import span
from katapod.model.errors import KatapodError
from katapod.plan.jail import JailPlan
from katapod.tasks import beside, finish
from katapod.vmm.errors import VmmFailed, VmmLinkBroken, VmmRefused
from katapod.vmm.protocol import Channel, DiskError, VmmLogs
from katapod.vmm.qemu.command_line import FdSlot, QemuPlan, render_qemu
from katapod.vmm.qemu.control import QemuControl, host_threads, short_path
from katapod.vmm.qemu.hotplug import disk_of_node, plan_vcpus
from katapod.vmm.qemu.jail import look_at_host, plan_jail
from katapod.vmm.qemu.qmp import QmpClient
from katapod.vmm.qemu.release import with_sound_threads

__all__ = ["QemuProcess", "busy_s", "disk_error", "running_qemu"]

log = logging.getLogger(__name__)

QMP_LIMIT_S = 10.0
STATE_LIMIT_S = 30.0  # to write or to read a device state, some hundred KiB
SOFT_STOP_S = 3.0
VCPU_THREADS = ("CPU ", "ALL CPUs/")
STATE_FD = "state"  # what QEMU calls the descriptor that it writes its state to
ENVIRONMENT = {"LC_ALL": "C.UTF-8"}


class QemuProcess(QemuControl):
    """One VM: a VirtualMachine."""

    def __init__(
        self,
        plan: QemuPlan,
        child: Child,
        qmp: QmpClient,
        sockets: dict[FdSlot, socket.socket],
        logs: VmmLogs,
    ) -> None:
        super().__init__(qmp, child.pid)
        self.plan = plan
        self.child = child
        self.logs = logs
        self.stopping = False
        self.expendable = False  # nothing in the guest is worth a graceful end
        self._sockets = sockets

    @property
    def pid(self) -> int:
        return self.child.pid

    @property
    def returncode(self) -> int | None:
        return self.child.process.returncode

    def take_channel(self, channel: Channel) -> socket.socket | None:
        return self._sockets.pop(FdSlot[channel.name], None)

    async def add_vcpus(self, count: int) -> None:
        free = await self.qmp.execute("query-hotpluggable-cpus")
        try:
            plan = plan_vcpus(free, count)
        except ValueError as exc:
            raise KatapodError(str(exc), hint="raise default_maxvcpus in configuration.toml") from exc
        await self.qmp.plug(plan)

    async def vcpu_threads(self) -> list[int]:
        answers = await self.qmp.execute("query-cpus-fast")
        threads = host_threads(self.pid)
        numbers = dict.fromkeys(vcpu["thread-id"] for vcpu in answers)  # one thread may run all of them
        return [threads[number] for number in numbers if number in threads]

    def busy_s(self) -> float:
        return busy_s(self.pid)

    def on_disk_error(self, handler: Callable[[DiskError], None]) -> None:
        self.qmp.subscribe("BLOCK_IO_ERROR", lambda event: handler(disk_error(event)))

    def expect_stop(self) -> asyncio.Future[Any]:
        return self.qmp.expect("STOP")

    async def wait_end(self) -> str:
        """Block until QEMU ends; returns how, in words."""
        await self.child.process.wait()
        return self.child.describe_end()

    def explain_end(self) -> VmmFailed:
        """The error to raise when QEMU has ended and nobody asked it to."""
        said = read_tail(self.logs.vmm, max_lines=5)
        console = read_tail(self.logs.console)
        text = f"QEMU ended unexpectedly: {_end_of(self.child)}"
        if said:
            text += f"; it said: {said}"
        if console:
            text += f"\nlast lines of the guest's console:\n{console}"
        return VmmFailed(text, returncode=self.child.process.returncode, command=" ".join(self.child.argv))

    async def run(self) -> None:
        await self.qmp.execute("cont")

    async def pause(self) -> None:
        await self.qmp.execute("stop")

    async def save_state(self, path: Path) -> None:
        await self.pause()
        ours, theirs = socket.socketpair()
        with ours, path.open("wb") as target:
            ours.setblocking(False)
            with theirs:
                await self.qmp.give_fd(STATE_FD, theirs.fileno())
            async with beside(_take_stream(ours, target), name="take-state") as taking:
                await self._migrate("migrate", f"fd:{STATE_FD}")
                try:
                    async with asyncio.timeout(STATE_LIMIT_S):
                        await taking
                except TimeoutError as exc:
                    what = f"its state does not end within {STATE_LIMIT_S:g} s"
                    raise VmmRefused(f"cannot save the guest: {what}") from exc

    async def load_state(self, state_fd: int) -> None:
        """QEMU ends when it cannot: another machine, a damaged file."""
        await self._migrate("migrate-incoming", f"fd:{state_fd}")

    async def _migrate(self, command: str, uri: str) -> None:
        """Source: QEMU's docs/devel/migration; x-ignore-shared leaves shared memory out of the stream."""
        wanted = [{"capability": name, "state": True} for name in ("x-ignore-shared", "events")]
        ended = self.qmp.expect("MIGRATION", lambda data: data.get("status") in ("completed", "failed"))
        await self.qmp.execute("migrate-set-capabilities", {"capabilities": wanted})
        await self.qmp.execute(command, {"uri": uri})
        try:
            async with asyncio.timeout(STATE_LIMIT_S):
                status = (await ended)["status"]
        except TimeoutError as exc:
            raise VmmRefused(f"cannot {command}: no end within {STATE_LIMIT_S:g} s") from exc
        if status != "completed":
            raise VmmRefused(f"cannot {command}: QEMU says that it failed: {read_tail(self.logs.vmm, max_lines=5)}")

    async def stop(self, *, soft: bool = True) -> bool:
        """End QEMU: QMP quit, a wait, SIGKILL; at once if it is expendable. Returns whether it ended gracefully."""
        self.stopping = True
        if self.child.process.returncode is None and soft and not self.expendable:
            try:
                async with asyncio.timeout(SOFT_STOP_S):  # for both: a QEMU that does not answer does not quit
                    with contextlib.suppress(VmmRefused, VmmLinkBroken):
                        await self.qmp.execute("quit")
                    await self.child.process.wait()
            except TimeoutError:
                if self.child.process.returncode is None:  # this process may have been the slow one
                    log.warning("QEMU did not quit within %g s and is killed", SOFT_STOP_S)
        graceful = self.child.process.returncode is not None
        await stop_child(self.child, soft=False)
        await self.qmp.close()
        _close_all(self._sockets)
        return graceful


def busy_s(pid: int) -> float:
    """As VirtualMachine.busy_s. QEMU calls the threads of virtual CPUs "CPU 0/KVM", "CPU 0/TCG" and so on, one that
    runs all of them "ALL CPUs/TCG" (debug-threads); without such names all threads count."""
    threads = thread_times(pid)
    vcpus = [each.run_ns + each.waited_ns for each in threads if each.name.startswith(VCPU_THREADS)]
    return min(vcpus, default=sum(each.run_ns + each.waited_ns for each in threads)) / 1e9


def disk_error(event: Mapping[str, Any]) -> DiskError:
    """Of the event BLOCK_IO_ERROR."""
    return DiskError(
        disk_id=disk_of_node(str(event.get("node-name", ""))),
        writing=event.get("operation") == "write",
        full=event.get("nospace") is True,
        stopped=event.get("action") == "stop",
    )


@contextlib.asynccontextmanager
async def running_qemu(
    plan: QemuPlan, logs: VmmLogs, *, given: Mapping[FdSlot, int] | None = None, netns: Path | None = None
) -> AsyncIterator[QemuProcess]:
    """Start QEMU, stopped before its first instruction (-S), with its monitor open; stop it at the end.

    `given` are descriptors that the caller has opened and closes: VSOCK and MEMORY where the plan names them,
    STATE for load_state. It runs in a jail (jail.py), in the network namespace `netns` if given, else in an empty one.

    Raises VmmFailed with what QEMU said when it does not come up, HostLacks, CannotRun, MissingProgram.
    """
    async with contextlib.AsyncExitStack() as stack:
        program = find_program(plan.program, package="qemu-system-x86")
        plan = await with_sound_threads(plan, program)
        theirs: dict[FdSlot, int] = dict(given or {})
        ours: dict[FdSlot, socket.socket] = {}
        closing = stack.enter_context(contextlib.ExitStack())  # descriptors that QEMU inherits
        stack.callback(_close_all, ours)

        for slot in plan.slots:
            if (path := plan.socket_of(slot)) is not None:
                monitor = _listen(path)
                closing.callback(monitor.close)
                theirs[slot] = monitor.fileno()
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        stack.callback(client.close)
        with short_path(plan.qmp_socket) as address:
            client.connect(address)  # queued in the backlog: no polling for QEMU to come up

        for slot in plan.slots:
            if slot in (FdSlot.VSOCK, FdSlot.MEMORY):
                if slot not in theirs:
                    raise VmmFailed(f"cannot start QEMU: the plan names {slot.value}, but none was given")
            elif slot is FdSlot.CPU_TABLE:
                theirs[slot] = closing.enter_context(_file_of(plan.cpu_table)).fileno()
            elif plan.socket_of(slot) is None:
                near, far = socket.socketpair()
                closing.callback(far.close)
                ours[slot], theirs[slot] = near, far.fileno()

        await stack.enter_async_context(kept_socket(ours.pop(FdSlot.CONSOLE), logs.console, logs.limit_bytes))
        said_to = await stack.enter_async_context(kept_pipe(logs.vmm, logs.limit_bytes))
        try:
            arguments = render_qemu(plan, theirs)
            jail, command = _jailed(plan, Path(program), arguments, netns)
            try:
                child = start_in_jail(jail, command, output=said_to.write_end, pass_fds=tuple(theirs.values()))
            except CannotRun as exc:
                raise CannotRun(str(exc), hint=_hint_for(Path(command.path))) from exc
            plan.pid_file.write_text(f"{child.pid}\n")
        finally:
            said_to.close()
            closing.close()
        stack.push_async_callback(stop_child, child, soft=False)
        try:
            qmp = await QmpClient.open(client, limit_s=QMP_LIMIT_S)
        except VmmLinkBroken as exc:
            raise await _failed_start(child, said_to, logs.vmm, str(exc)) from exc
        vm = QemuProcess(plan, child, qmp, ours, logs)
        stack.push_async_callback(_stop, vm)
        yield vm


def _jailed(plan: QemuPlan, program: Path, arguments: list[str], netns: Path | None) -> tuple[JailPlan, Program]:
    """Raises VmmFailed."""
    try:
        host = look_at_host(plan, program)
        jail = plan_jail(plan, host, netns)
    except (OSError, ValueError) as exc:
        cause = f"{exc.strerror}: {exc.filename}" if isinstance(exc, OSError) else str(exc)
        raise VmmFailed(f"cannot start QEMU: {cause}", command=" ".join(arguments)) from exc
    return jail, Program(str(host.program), tuple(arguments), ENVIRONMENT)


def _hint_for(program: Path) -> str:
    with contextlib.suppress(OSError), program.open("rb") as handle:
        if handle.read(2) == b"#!":
            return "a script finds no interpreter in the jail: name QEMU itself as the path in configuration.toml"
    return ""


async def _failed_start(child: Child, said_to: KeptPipe, log_path: Path, cause: str) -> VmmFailed:
    """Stop a QEMU that failed to start; returns the error, with the last lines of its output."""
    with contextlib.suppress(TimeoutError):  # it exits by itself if it rejected its arguments
        async with asyncio.timeout(1.0):
            await child.process.wait()
    ended_with = child.process.returncode  # before we end it ourselves
    if ended_with is not None:
        cause = _end_of(child)
    await stop_child(child, soft=False)
    await said_to.wait_end(1.0)
    said = read_tail(log_path, max_lines=10)
    return VmmFailed(
        f"cannot start QEMU: {cause}" + (f": {said}" if said else ""),
        returncode=ended_with,
        command=" ".join(child.argv),
    )


def _end_of(child: Child) -> str:
    """How it ended, in words; if a filter has ended it, for which system call."""
    end = child.describe_end()
    if child.process.returncode != -signal.SIGSYS:
        return end
    number = forbidden_call(child.pid, child.argv[0])
    what = f"number {number} (asm/unistd_64.h)" if number is not None else "which the kernel's log may name (dmesg)"
    return f"{end}: QEMU's -sandbox forbids a system call that it made, {what}"


async def _stop(vm: QemuProcess) -> None:
    with span("stop QEMU"):
        await finish(vm.stop(), name="stop-qemu")


async def _take_stream(connection: socket.socket, target: BinaryIO) -> None:
    """Write what comes, to its end. QEMU's `fd:` takes no plain file for writing."""
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(connection, 1 << 20):
        target.write(data)


def _file_of(content: bytes) -> BinaryIO:
    """A file without a name, for QEMU to open by its descriptor."""
    file = os.fdopen(os.memfd_create("katapod"), "wb", buffering=0)
    file.write(content)
    return file


def _close_all(sockets: dict[FdSlot, socket.socket]) -> None:
    for sock in sockets.values():
        sock.close()
    sockets.clear()


def _listen(path: Path) -> socket.socket:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with short_path(path) as address:
            listener.bind(address)
        listener.listen(4)
    except OSError as exc:
        listener.close()
        raise KatapodError(f"cannot listen on {path}: {exc.strerror or exc}") from exc
    return listener
