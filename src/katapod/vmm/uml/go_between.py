"""The go-between before a vhost-user daemon: what Linux' virtio_uml driver and the daemons expect of each other.

Only the messages that set a device up pass here; the daemon then has the guest's memory and rings, and data goes past
us. The driver reads the device's configuration by messages, which is answered here. It sends a memory table with room
for two regions whatever it has, which the Rust daemon refuses, so that is cut. Nothing passes that is not named here.

A driver kicks a ring as soon as it has enabled it, and the Rust daemon loses a kick that comes before it has heard of
that. So the driver is told to wait for acknowledgements, and that of a ring comes when the daemon has answered a later
question. Source: QEMU's docs/interop/vhost-user.
"""

import asyncio
import contextlib
import logging
import os
import socket
from collections import deque
from pathlib import Path

from katapod.tasks import beside
from katapod.vmm.uml.sockets import short_path
from katapod.vmm.uml.vhost_user import (
    NEED_REPLY,
    PROTOCOL_OFFERED,
    REPLY_ACK,
    ConfigSpace,
    Connection,
    Frame,
    Request,
    VhostUserFailed,
    parse_integer,
    parse_memory_table,
    render_integer,
    render_memory_table,
)

__all__ = ["GoBetween"]

log = logging.getLogger(__name__)

OFFERED = PROTOCOL_OFFERED | REPLY_ACK
WAITING_MAX = 16  # answers of the daemon's

_PASSED = frozenset(
    {
        Request.GET_FEATURES,
        Request.SET_FEATURES,
        Request.SET_OWNER,
        Request.SET_VRING_NUM,
        Request.SET_VRING_ADDR,
        Request.SET_VRING_BASE,
        Request.SET_VRING_KICK,
        Request.SET_VRING_CALL,
        Request.SET_VRING_ENABLE,
    }
)
_WITH_DESCRIPTORS = frozenset({Request.SET_MEM_TABLE, Request.SET_VRING_KICK, Request.SET_VRING_CALL})


class GoBetween:
    """Of one device. `failure`: why it has ended by itself, if it has."""

    what = "device"  # for people
    daemon_name = "its daemon"

    def __init__(self, config: bytes) -> None:
        self.failure: VhostUserFailed | None = None
        self.ended = asyncio.Event()
        self.joined = False  # the guest's kernel has connected
        self.config = config
        self._waiting: deque[int] = deque()  # requests of the guest's that the daemon's next answers are for
        self.request_sockets: list[int] = []  # kept open: their end tells the guest that the device has gone

    async def serve(self, listener: socket.socket, daemon: Path | socket.socket) -> None:
        """Join the first who connects to the daemon, until one of them hangs up. Returns then, with `failure` if one
        has broken the rules."""
        try:
            loop = asyncio.get_running_loop()
            with contextlib.ExitStack() as stack:
                front_end, _ = await loop.sock_accept(listener)
                self.joined = True
                guest = Connection(front_end, "the guest's kernel")
                stack.callback(guest.close)
                listener.close()  # a guest's kernel has each of its devices once
                back_end = Connection(await _connected(daemon), self.daemon_name)
                stack.callback(back_end.close)
                await self.greet(back_end)
                async with (
                    beside(self._to_daemon(guest, back_end), name=f"{self.what}-requests") as requests,
                    beside(self._to_guest(back_end, guest), name=f"{self.what}-answers") as answers,
                ):
                    done, _ = await asyncio.wait({requests, answers}, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        task.result()
        except (VhostUserFailed, OSError) as exc:
            self.failure = (
                exc if isinstance(exc, VhostUserFailed) else VhostUserFailed(f"cannot join a {self.what}: {exc}")
            )
            log.warning("the guest's %s has ended: %s", self.what, self.failure)
        finally:
            self.close()

    async def greet(self, daemon: Connection) -> None:
        """Before the guest's first message passes. Raises VhostUserFailed."""

    async def configure(self, frame: Frame, daemon: Connection) -> None:
        """The guest writes to the configuration. Raises VhostUserFailed."""
        raise VhostUserFailed(f"cannot pass request {frame.request} of the guest's kernel: unknown")

    def close(self) -> None:
        """Tell the guest's kernel that the device has gone: what it asks for from then on fails. Idempotent."""
        for fd in self.request_sockets:
            os.close(fd)
        self.request_sockets.clear()
        self.ended.set()

    async def _to_daemon(self, guest: Connection, daemon: Connection) -> None:
        while (frame := await guest.receive()) is not None:
            with frame:
                if await self._answered(frame, guest):
                    continue
                if not await self._done_here(frame, daemon):
                    await self._pass(frame, daemon)
                if frame.flags & NEED_REPLY and frame.request != Request.SET_VRING_ENABLE:
                    await guest.reply(frame.request, render_integer(0))

    async def _pass(self, frame: Frame, daemon: Connection) -> None:
        payload = frame.payload
        if frame.request == Request.SET_MEM_TABLE:
            payload = render_memory_table(parse_memory_table(frame))
        elif frame.request not in _PASSED:
            raise VhostUserFailed(f"cannot pass request {frame.request} of the guest's kernel: unknown")
        if frame.descriptors and frame.request not in _WITH_DESCRIPTORS:
            raise VhostUserFailed(f"cannot pass request {frame.request} of the guest's kernel: it has descriptors")
        await daemon.send(frame.request, payload, descriptors=frame.descriptors)
        asks = frame.request == Request.GET_FEATURES
        if asks or (frame.request == Request.SET_VRING_ENABLE and frame.flags & NEED_REPLY):
            if len(self._waiting) == WAITING_MAX:
                raise VhostUserFailed("cannot pass requests of the guest's kernel: it does not wait for answers")
            self._waiting.append(frame.request)
            if not asks:  # what it does is done, in order, before it answers this
                await daemon.send(Request.GET_FEATURES, b"")

    async def _answered(self, frame: Frame, guest: Connection) -> bool:
        """Answer what the daemon is not asked; returns whether it was that."""
        match frame.request:
            case Request.GET_PROTOCOL_FEATURES:
                await guest.reply(frame.request, render_integer(OFFERED))
            case Request.GET_CONFIG:
                await guest.reply(frame.request, ConfigSpace.parse(frame.payload).answer(self.config))
            case _:
                return False
        return True

    async def _done_here(self, frame: Frame, daemon: Connection) -> bool:
        """Do what the daemon does not hear of as it is; returns whether it was that."""
        match frame.request:
            case Request.SET_PROTOCOL_FEATURES:
                if parse_integer(frame.payload) & ~OFFERED:
                    raise VhostUserFailed(f"cannot join a {self.what}: the guest's kernel wants what was not offered")
            case Request.SET_BACKEND_REQ_FD:
                if len(frame.descriptors) != 1 or self.request_sockets:
                    raise VhostUserFailed("cannot take a socket for requests: there is one, or none was sent")
                self.request_sockets.append(frame.take_descriptors()[0])
            case Request.SET_CONFIG:
                await self.configure(frame, daemon)
            case _:
                return False
        return True

    async def _to_guest(self, daemon: Connection, guest: Connection) -> None:
        """The daemon is asked for its features only, by the guest or by us."""
        while (frame := await daemon.receive()) is not None:
            with frame:
                if frame.request != Request.GET_FEATURES or frame.descriptors or not self._waiting:
                    raise VhostUserFailed(f"cannot pass an answer of {self.daemon_name}: nobody asked {frame.request}")
                features, request = parse_integer(frame.payload), self._waiting.popleft()
                await guest.reply(request, render_integer(features if request == Request.GET_FEATURES else 0))


async def _connected(daemon: Path | socket.socket) -> socket.socket:
    """Raises OSError."""
    if isinstance(daemon, socket.socket):
        return daemon
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        with short_path(daemon) as address:
            await asyncio.get_running_loop().sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    return sock
