"""QMP: one connection to a QEMU's monitor. Source: QEMU's docs/interop/qmp-spec.

Replies are matched by id; events go to whoever waits for them; a broken link fails every waiter.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import socket
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import msgspec

from katapod.tasks import Background
from katapod.vmm.errors import VmmLinkBroken, VmmRefused
from katapod.vmm.qemu.hotplug import HotplugPlan, QmpStep

__all__ = ["QmpClient"]

log = logging.getLogger(__name__)

REPLY_LIMIT_S = 20.0
REFUSED_LIMIT_S = 5.0  # for the guest to let go of what another connection may have asked it to
LINE_MAX = 4 * 1024 * 1024


class _Reply(msgspec.Struct, frozen=True):
    """Any message of the monitor: greeting, reply or event."""

    QMP: Any = None
    id: int | None = None
    result: Any = msgspec.field(default=msgspec.UNSET, name="return")
    error: dict[str, str] | None = None
    event: str | None = None
    data: dict[str, Any] | None = None


_decoder = msgspec.json.Decoder(_Reply)


class _Watcher(NamedTuple):
    event: str
    wanted: Callable[[Any], bool]
    meaning: Callable[[Any], Any]
    future: asyncio.Future[Any]


class QmpClient:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, sock: socket.socket) -> None:
        self._reader = reader
        self._writer = writer
        self._sock = sock
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._watchers: list[_Watcher] = []
        self._handlers: dict[str, Callable[[Mapping[str, Any]], None]] = {}
        self._leaving: set[str] = set()  # devices that the guest was asked to let go of
        self._unplugged: dict[str, int] = {}  # by device, the steps that are done of an unplugging that failed
        self._broken: str | None = None
        self._background = Background()

    @classmethod
    async def open(cls, sock: socket.socket, *, limit_s: float) -> "QmpClient":
        """Negotiate on a connected socket, which the client owns. Raises VmmLinkBroken."""
        reader, writer = await asyncio.open_unix_connection(sock=sock, limit=LINE_MAX)
        client = cls(reader, writer, sock)
        try:
            async with asyncio.timeout(limit_s):
                line = await reader.readline()
            if not line:
                raise VmmLinkBroken("QEMU closed its monitor before it greeted")
            if _decoder.decode(line).QMP is None:
                raise VmmLinkBroken("cannot open QEMU's monitor: it does not greet as QMP does")
            client._background.start(client._read(), name="qmp-reader")
            await client.execute("qmp_capabilities", limit_s=limit_s)
        except (VmmRefused, OSError, ValueError, RecursionError) as exc:  # as in _read; a TimeoutError is an OSError
            await client.close()
            raise VmmLinkBroken(f"cannot open QEMU's monitor: {str(exc) or 'no greeting in time'}") from exc
        except BaseException:
            await client.close()
            raise
        return client

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, limit_s: float = REPLY_LIMIT_S, fd: int = -1
    ) -> Any:
        """Run one command; returns its `return` value. `fd` goes with it (getfd). Raises VmmRefused, VmmLinkBroken."""
        if self._broken is not None:
            raise VmmLinkBroken(f"cannot {command}: {self._broken}")
        number = next(self._ids)
        message: dict[str, Any] = {"execute": command, "id": number}
        if arguments:
            message["arguments"] = arguments
        log.debug("qmp: %s %s", command, arguments or "")
        future: asyncio.Future[_Reply] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            async with asyncio.timeout(limit_s):
                data = msgspec.json.encode(message) + b"\n"
                if fd >= 0:
                    data = await self._send_with(data, fd)
                self._writer.write(data)
                await self._writer.drain()
                reply = await asyncio.shield(future)
        except TimeoutError as exc:
            if not future.done():
                raise VmmLinkBroken(f"cannot {command}: QEMU did not answer within {limit_s:g} s") from exc
            reply = future.result()  # the loop woke up late: the answer and the end of the time were there together
        except OSError as exc:
            raise VmmLinkBroken(f"cannot {command}: {exc}") from exc
        finally:
            self._waiting.pop(number, None)
        if reply.error is not None:
            said = reply.error.get("desc", "?")
            raise VmmRefused(f"cannot {command}: QEMU says: {said}", kind=reply.error.get("class", ""))
        return reply.result

    async def _send_with(self, data: bytes, fd: int) -> bytes:
        """Send `data` and the descriptor, past the transport, which cannot; returns what is still to be sent."""
        while True:
            if self._writer.transport.get_write_buffer_size() == 0:
                with contextlib.suppress(BlockingIOError):
                    return data[socket.send_fds(self._sock, [data], [fd]) :]
            await asyncio.sleep(0.005)

    async def give_fd(self, name: str, fd: int) -> None:
        """Hand QEMU a copy of a descriptor under a name that the next command may use. Raises as execute."""
        await self.execute("getfd", {"fdname": name}, fd=fd)

    async def run_steps(self, steps: Iterable[QmpStep]) -> None:
        """Run the steps of a plan in order."""
        for step in steps:
            await self._do(step)

    async def _do(self, step: QmpStep) -> None:
        if step.file is None:
            await self.execute(step.command, step.arguments)
            return
        file = step.file
        flags = (os.O_RDONLY if file.read_only else os.O_RDWR) | (os.O_DIRECT if file.direct else 0)
        try:
            fd = os.open(file.path, flags | os.O_CLOEXEC)
        except OSError as exc:
            raise VmmRefused(f"cannot open {file.path}: {exc.strerror}") from exc
        try:
            await self.execute(step.command, step.arguments, fd=fd)
        finally:
            os.close(fd)

    async def plug(self, plan: HotplugPlan) -> None:
        """Plug a device; what was done of a plan that fails half-way is undone."""
        done = 0
        try:
            for step in plan.steps:
                await self._do(step)
                done += 1
        except VmmRefused:
            for step in plan.undo[len(plan.undo) - done :] if done else ():
                with contextlib.suppress(VmmRefused):
                    await self.execute(step.command, step.arguments)
            raise

    async def unplug(self, plan: HotplugPlan, *, limit_s: float = REPLY_LIMIT_S) -> None:
        """Take a device out; waits until the guest has let go of it. After a failure it may be called again, and takes
        up what is left. Raises VmmRefused, VmmLinkBroken."""
        if not plan.removable:
            raise VmmRefused(f"cannot unplug {plan.what}: it stays until the VM ends")
        deleted = self.expect("DEVICE_DELETED", lambda data: data.get("device") == plan.device_id)
        first, *rest = plan.undo
        done = self._unplugged.get(plan.device_id, 0)
        was_there = True
        if not done:
            try:
                was_there = await self._delete(plan.device_id, first, deleted, limit_s)
            except TimeoutError as exc:
                raise VmmRefused(f"cannot unplug {plan.what}: the guest did not let go within {limit_s:g} s") from exc
            finally:
                self._watchers = [watcher for watcher in self._watchers if watcher.future is not deleted]
        for step in rest[max(0, done - 1) :]:
            self._unplugged[plan.device_id] = 1 + rest.index(step)
            try:
                await self.execute(step.command, step.arguments)
            except VmmRefused:
                if was_there:
                    raise  # else whoever has removed the device has removed this, too
        self._unplugged.pop(plan.device_id, None)

    async def _delete(self, device_id: str, step: QmpStep, deleted: "asyncio.Future[Any]", limit_s: float) -> bool:
        """Ask for the removal, and wait for the guest. Returns False if the device is gone already, by what another
        connection has asked for. Raises VmmRefused, VmmLinkBroken, TimeoutError."""
        refusal: VmmRefused | None = None
        try:
            await self.execute(step.command, step.arguments)
        except VmmRefused as exc:
            asked, gone = device_id in self._leaving, exc.kind == "DeviceNotFound"
            if gone:  # the guest has let go since it was asked
                self._leaving.discard(device_id)
                return asked
            refusal = None if asked else exc
        self._leaving.add(device_id)  # QEMU refuses to be asked again, until the guest has answered
        try:
            async with asyncio.timeout(min(limit_s, REFUSED_LIMIT_S) if refusal is not None else limit_s):
                await asyncio.shield(deleted)
        except TimeoutError:
            if deleted.done():
                deleted.result()  # as in execute
            elif refusal is None:
                raise
            else:
                self._leaving.discard(device_id)
                raise refusal from None
        self._leaving.discard(device_id)
        return True

    def expect(
        self,
        event: str,
        wanted: Callable[[Any], bool] = lambda data: True,
        meaning: Callable[[Any], Any] = lambda data: data,
    ) -> asyncio.Future[Any]:
        """Return a future of the `meaning` of the next `event` whose data is `wanted`. Call it before what causes the
        event."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self._broken is not None:
            future.set_exception(VmmLinkBroken(f"cannot wait for {event}: {self._broken}"))
            future.exception()  # as in _fail
            return future
        self._watchers.append(_Watcher(event, wanted, meaning, future))
        return future

    def subscribe(self, event: str, handler: Callable[[Mapping[str, Any]], None]) -> None:
        """Have `handler` called with the data of each `event` from now on. It must raise nothing."""
        self._handlers[event] = handler

    async def close(self) -> None:
        """Idempotent."""
        self._fail("the monitor was closed")
        self._writer.transport.abort()  # a close would first wait until QEMU has read what was written
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()
        await self._background.close()

    def _fail(self, cause: str) -> None:
        if self._broken is None:
            self._broken = cause
        for future in [*self._waiting.values(), *(watcher.future for watcher in self._watchers)]:
            if not future.done():
                future.set_exception(VmmLinkBroken(f"the link to QEMU broke: {cause}"))
                future.exception()  # a watcher may be gone: not an error of its own
        self._watchers.clear()

    async def _read(self) -> None:
        try:
            while line := await self._reader.readline():
                self._take(_decoder.decode(line))
            self._fail("QEMU closed its monitor")
        except (OSError, ValueError, RecursionError) as exc:  # a line past the limit, not JSON, not QMP, or too deep
            self._fail(str(exc))

    def _take(self, reply: _Reply) -> None:
        if reply.event is not None:
            log.debug("qmp event: %s", reply.event)
            if reply.event in self._handlers:
                self._handlers[reply.event](reply.data or {})
            for watcher in list(self._watchers):
                if watcher.future.done():
                    self._watchers.remove(watcher)
                elif watcher.event == reply.event and watcher.wanted(reply.data or {}):
                    self._watchers.remove(watcher)
                    watcher.future.set_result(watcher.meaning(reply.data))
        elif reply.id is not None:
            waiter = self._waiting.get(reply.id)
            if waiter is not None and not waiter.done():
                waiter.set_result(reply)
