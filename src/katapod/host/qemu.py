"""A running QEMU: carries out a QemuPlan, owns its descriptors, and stops it softly or hard."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from katapod.host.logs import kept_pipe, kept_socket, read_tail
from katapod.host.process import Child, find_program, spawn, stop_child
from katapod.host.qmp import QmpClient, QmpError, QmpLinkBroken
from katapod.host.tasks import finish
from katapod.model.errors import KatapodError
from katapod.plan.vmm import FdSlot, QemuPlan, render_qemu

__all__ = ["QemuFailed", "QemuLogs", "QemuProcess", "running_qemu"]

log = logging.getLogger(__name__)

QMP_LIMIT_S = 10.0
SOFT_STOP_S = 3.0


class QemuFailed(KatapodError):
    """QEMU did not start, or ended by itself. Carries its command line."""


@dataclass(frozen=True, slots=True)
class QemuLogs:
    console: Path  # what the guest kernel and its init say
    vmm: Path  # what QEMU says
    limit_bytes: int = 256 * 1024


class QemuProcess:
    """One VM. `agent` is our end of the agent channel (None with vsock)."""

    def __init__(
        self,
        plan: QemuPlan,
        child: Child,
        qmp: QmpClient,
        sockets: dict[FdSlot, socket.socket],
        logs: QemuLogs,
    ) -> None:
        self.plan = plan
        self.child = child
        self.qmp = qmp
        self.logs = logs
        self.stopping = False
        self._sockets = sockets

    @property
    def pid(self) -> int:
        return self.child.pid

    def take_socket(self, slot: FdSlot) -> socket.socket | None:
        """Hand our end of a channel to the caller, who owns it from now on."""
        return self._sockets.pop(slot, None)

    async def wait_end(self) -> str:
        """Block until QEMU ends; returns how, in words."""
        await self.child.process.wait()
        return self.child.describe_end()

    def explain_end(self) -> QemuFailed:
        """The error to raise when QEMU has ended and nobody asked it to."""
        said = read_tail(self.logs.vmm, max_lines=5)
        console = read_tail(self.logs.console)
        text = f"QEMU ended unexpectedly: {self.child.describe_end()}"
        if said:
            text += f"; it said: {said}"
        if console:
            text += f"\nlast lines of the guest's console:\n{console}"
        return QemuFailed(text, command=" ".join(self.child.argv))

    async def resume(self) -> None:
        await self.qmp.execute("cont")

    async def stop(self, *, soft: bool = True) -> bool:
        """End QEMU: QMP quit, a wait, SIGKILL. Returns whether it went softly. Idempotent."""
        self.stopping = True
        if self.child.process.returncode is None and soft:
            try:
                async with asyncio.timeout(SOFT_STOP_S):  # for both: a QEMU that does not answer does not quit
                    with contextlib.suppress(QmpError, QmpLinkBroken):
                        await self.qmp.execute("quit")
                    await self.child.process.wait()
            except TimeoutError:
                log.warning("QEMU did not quit within %g s and is killed", SOFT_STOP_S)
        graceful = self.child.process.returncode is not None
        await stop_child(self.child, soft=False)
        await self.qmp.close()
        _close_all(self._sockets)
        return graceful


@contextlib.asynccontextmanager
async def running_qemu(plan: QemuPlan, logs: QemuLogs, *, vsock_fd: int | None = None) -> AsyncIterator[QemuProcess]:
    """Start QEMU, stopped before its first instruction (-S), with its monitor open; stop it at the end.

    Raises QemuFailed with what QEMU said when it does not come up.
    """
    async with contextlib.AsyncExitStack() as stack:
        find_program(plan.program, package="qemu-system-x86")
        theirs: dict[FdSlot, int] = {}
        ours: dict[FdSlot, socket.socket] = {}
        closing = stack.enter_context(contextlib.ExitStack())  # descriptors that QEMU inherits
        stack.callback(_close_all, ours)

        monitor = _listen(plan.qmp_socket)
        closing.callback(monitor.close)
        theirs[FdSlot.QMP] = monitor.fileno()
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        stack.callback(client.close)
        client.connect(str(plan.qmp_socket))  # queued in the backlog: no polling for QEMU to come up

        for slot in plan.slots:
            if slot is FdSlot.VSOCK:
                if vsock_fd is None:
                    raise QemuFailed("cannot start QEMU: the plan names a vsock device, but none was claimed")
                theirs[slot] = vsock_fd
            elif slot is not FdSlot.QMP:
                near, far = socket.socketpair()
                closing.callback(far.close)
                ours[slot], theirs[slot] = near, far.fileno()

        await stack.enter_async_context(kept_socket(ours.pop(FdSlot.CONSOLE), logs.console, logs.limit_bytes))
        said_to = await stack.enter_async_context(kept_pipe(logs.vmm, logs.limit_bytes))
        try:
            child = await spawn(render_qemu(plan, theirs), output=said_to.write_end, pass_fds=list(theirs.values()))
        finally:
            said_to.close()
            closing.close()
        stack.push_async_callback(stop_child, child, soft=False)
        try:
            qmp = await QmpClient.open(client, limit_s=QMP_LIMIT_S)
        except QmpLinkBroken as exc:
            with contextlib.suppress(TimeoutError):  # it ends by itself when it did not like its arguments
                async with asyncio.timeout(1.0):
                    await child.process.wait()
            cause = child.describe_end() if child.process.returncode is not None else str(exc)
            await stop_child(child, soft=False)
            await said_to.wait_end(1.0)
            said = read_tail(logs.vmm, max_lines=10)
            raise QemuFailed(
                f"cannot start QEMU: {cause}" + (f": {said}" if said else ""),
                command=" ".join(child.argv),
            ) from exc
        vm = QemuProcess(plan, child, qmp, ours, logs)
        stack.push_async_callback(lambda: finish(vm.stop(), name="stop-qemu"))
        yield vm


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
        listener.bind(str(path))
        listener.listen(4)
    except OSError as exc:
        listener.close()
        raise KatapodError(f"cannot listen on {path}: {exc.strerror or exc}") from exc
    return listener
