"""One container of the supervisor: what it is in the guest, on disk and on the host."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable

from katapod.model.errors import KatapodError
from katapod.model.exit_status import KILLED_STATUS
from katapod.model.record import State as Made
from katapod.oci.errors import OciError
from katapod.oci.processes import ExecProcess, ProcessStreams, ProxyLink
from katapod.oci.records import Record, State
from katapod.sandbox.container import Container
from katapod.sandbox.stdio import Sink, Source
from katapod.sandbox.task import follow

__all__ = ["OciContainer"]

log = logging.getLogger(__name__)

PROXY_END_S = 5.0


class OciContainer:
    """`made`: in the guest. `status`: OCI's name; `stopped` is set when that is."""

    def __init__(
        self, made: Container, record: Record, state: State, proxy: ProxyLink, streams: ProcessStreams
    ) -> None:
        self.made = made
        self.id = made.container_id
        self.record = record
        self.state = state
        self.proxy = proxy
        self.streams = streams
        self.status = "creating"
        self.starting = False
        self.insisting = False
        self.stopped = asyncio.Event()
        self.deleting = asyncio.Lock()
        self.listening: asyncio.Task[None] | None = None
        self.following: asyncio.Task[None] | None = None
        self.execs: list[ExecProcess] = []  # of execs.py, which adds them and takes them out

    @property
    def has_ended(self) -> bool:
        """Whether it has ended in the guest, though whoever waits for it may not have heard yet."""
        return self.made.record.state is Made.STOPPED

    def mark(self, status: str) -> None:
        """Take a state, on disk first: who sees it from outside sees it there."""
        self.status = status
        self.state["status"] = status
        if status == "stopped":
            self.state["pid"] = 0
            self.state["finished"] = time.time()
            self.stopped.set()
        try:
            self.record.write(self.state)
        except OciError as exc:
            log.error("%s", exc)

    async def resize(self) -> None:
        """Give the guest's terminal the size of ours. Raises KatapodError."""
        size = self.streams.size()
        if size is not None:
            await self.made.sandbox.guard(self.made.process.resize(*size))

    async def follow(
        self, stdin: Source, stdout: Sink, stderr: Sink, ended: Callable[["OciContainer", int], Awaitable[None]]
    ) -> None:
        """Carry its streams to its end, and say with which status that was."""
        status = KILLED_STATUS
        try:
            if self.made.process.terminal:
                with contextlib.suppress(KatapodError):
                    await self.resize()
            status = await follow(self.made, stdin, stdout, stderr)
        except KatapodError as exc:
            log.error("container %s has ended: %s", self.id, exc)
        finally:
            self.streams.close()
            await ended(self, status)

    async def close(self) -> None:
        """Let its proxy end, whatever that waits for."""
        self.proxy.exit(KILLED_STATUS)
        if self.listening is not None:
            await asyncio.wait({self.listening}, timeout=PROXY_END_S)
            self.listening.cancel()
            await asyncio.wait({self.listening})
        self.proxy.close()
