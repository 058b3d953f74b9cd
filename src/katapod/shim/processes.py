"""What the shim knows about each process that containerd asked for: init processes and execs."""

import asyncio
import time
from pathlib import Path

from katapod.model import oci
from katapod.model.errors import InvalidState
from katapod.sandbox.container import Container
from katapod.sandbox.stdio import GuestProcess
from katapod.shim.pb import task_pb2
from katapod.shim.streams import IoUris, Streams

__all__ = ["ExecProcess", "TaskProcess"]

_NAMES: dict[int, str] = {
    task_pb2.CREATED: "created",
    task_pb2.RUNNING: "running",
    task_pb2.STOPPED: "stopped",
    task_pb2.PAUSED: "paused",
}


class _Process:
    """`status` is one of containerd's; `exited` is set when the process has ended and its streams are drained."""

    def __init__(self, uris: IoUris) -> None:
        self.uris = uris
        self.status = task_pb2.CREATED
        self.exit_status = 0
        self.exited_ns = 0  # since the epoch
        self.exited = asyncio.Event()
        self.streams: Streams | None = None
        self.input_ended = False  # CloseIO was called, perhaps before there were streams
        self.starting = False  # Start was called: from then on whoever started it reports its end
        self.following: asyncio.Task[None] | None = None

    @property
    def started(self) -> bool:
        return self.following is not None

    def open(self, streams: Streams) -> None:
        self.streams = streams
        if self.input_ended:
            streams.end_input()

    def mark_exited(self, status: int) -> None:
        if self.status == task_pb2.STOPPED:
            return
        self.status = task_pb2.STOPPED
        self.exit_status = status
        self.exited_ns = time.time_ns()
        self.exited.set()

    def require(self, what: str, *needed: int) -> None:
        """Raises InvalidState."""
        if self.status not in needed:
            wanted = " or ".join(_NAMES[status] for status in needed)
            raise InvalidState(f"cannot {what} in state {_NAMES[self.status]}; needs {wanted}{self.cause()}")

    def cause(self) -> str:
        """Why it is in its state, where something else caused that, as ": ..."; else empty."""
        return ""


class TaskProcess(_Process):
    """The init process of a container."""

    def __init__(self, container: Container, uris: IoUris, bundle: Path, rootfs: Path | None) -> None:
        """`rootfs`: where we have mounted its root file system; None if the engine has."""
        super().__init__(uris)
        self.container = container
        self.bundle = bundle
        self.rootfs = rootfs
        self.deleting = asyncio.Lock()
        self.insisting: asyncio.Task[None] | None = None
        self.execs: dict[str, ExecProcess] = {}

    @property
    def guest(self) -> GuestProcess:
        return self.container.process

    def cause(self) -> str:
        death = self.container.sandbox.death
        return f": {death.result()}" if death.done() and not death.cancelled() else ""


class ExecProcess(_Process):
    """A further process; the guest creates it when it is started."""

    def __init__(self, exec_id: str, process: oci.Process, uris: IoUris) -> None:
        super().__init__(uris)
        self.exec_id = exec_id
        self.process = process
        self.guest: GuestProcess | None = None
