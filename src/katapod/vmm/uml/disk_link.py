"""The go-between before a qemu-storage-daemon, for a disk whose size may change while the guest has it.

The daemon of QEMU 7.2 does not tell its guest of a new size. So the configuration is read from it once, answered here,
and changed here; the guest's kernel is told by the socket that it has sent for requests, and reads it again. That of
QEMU 10 tells whoever has given it such a socket, and is killed by a signal if nobody has: it gets one of ours.

Source: Virtual I/O Device (VIRTIO) 1.2, section 5.2.4; QEMU's docs/interop/vhost-user, back-end message types.
"""

import contextlib
import os
import socket
import stat
import struct
from collections.abc import AsyncIterator
from pathlib import Path

from katapod.tasks import beside
from katapod.vmm.uml.go_between import GoBetween
from katapod.vmm.uml.vhost_user import HEADER, VERSION, ConfigSpace, Connection, Frame, Request, VhostUserFailed

__all__ = ["DiskLink", "joining_disk"]

SECTOR = 512
CONFIG_BYTES = 60  # of virtio_blk_config, as far as QEMU 7.2 has it
WRITEBACK_AT = 32  # the one byte of it that a driver may write: whether there is a write cache
CONFIG_CHANGED = HEADER.pack(2, VERSION, 0)  # VHOST_USER_BACKEND_CONFIG_CHANGE_MSG
READ_MAX = 1 << 16
_CONFIG = struct.Struct("<III")
_CAPACITY = struct.Struct("<Q")


class DiskLink(GoBetween):
    what = "disk"
    daemon_name = "qemu-storage-daemon"

    def __init__(self) -> None:
        super().__init__(b"")
        self._told, self._tells = socket.socketpair()

    def close(self) -> None:
        super().close()
        self._told.close()
        self._tells.close()

    async def greet(self, daemon: Connection) -> None:
        await daemon.send(Request.SET_BACKEND_REQ_FD, b"", descriptors=[self._tells.fileno()])
        self._tells.close()
        await daemon.send(Request.GET_CONFIG, _CONFIG.pack(0, CONFIG_BYTES, 0) + bytes(CONFIG_BYTES))
        frame = await daemon.receive()
        if frame is None:
            raise VhostUserFailed("cannot read a disk's configuration: qemu-storage-daemon has hung up")
        with frame:
            if frame.request != Request.GET_CONFIG or len(frame.payload) != _CONFIG.size + CONFIG_BYTES:
                raise VhostUserFailed("cannot read a disk's configuration: qemu-storage-daemon does not tell it")
            self.config = frame.payload[_CONFIG.size :]

    async def configure(self, frame: Frame, daemon: Connection) -> None:
        """A driver may say whether it wants a write cache; anything else is ignored."""
        space = ConfigSpace.parse(frame.payload)
        if (space.offset, space.size) == (WRITEBACK_AT, 1):
            value = frame.payload[_CONFIG.size :]
            self.config = self.config[:WRITEBACK_AT] + value + self.config[WRITEBACK_AT + 1 :]
            await daemon.send(Request.SET_CONFIG, _CONFIG.pack(WRITEBACK_AT, 1, 0) + value)

    def resize(self, size: int) -> None:
        """Have the guest's kernel see that the disk has `size` bytes. Raises VhostUserFailed if it cannot be told."""
        if not self.config or self.ended.is_set() or not self.request_sockets:
            raise VhostUserFailed("cannot tell the guest of a disk's size: it does not use the disk")
        with contextlib.suppress(OSError):  # what the daemon said of it: it waits when nobody reads
            self._told.recv(READ_MAX, socket.MSG_DONTWAIT)
        self.config = _CAPACITY.pack(size // SECTOR) + self.config[_CAPACITY.size :]
        fd = self.request_sockets[0]
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise VhostUserFailed("cannot tell the guest of a disk's size: what it sent for that is no socket")
        try:
            with socket.socket(fileno=os.dup(fd)) as requests:
                sent = requests.send(CONFIG_CHANGED, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError as exc:
            raise VhostUserFailed(f"cannot tell the guest of a disk's size: {exc.strerror}") from exc
        if sent != len(CONFIG_CHANGED):
            raise VhostUserFailed("cannot tell the guest of a disk's size: it does not read")


@contextlib.asynccontextmanager
async def joining_disk(listener: socket.socket, daemon: Path) -> AsyncIterator[DiskLink]:
    """Join the first guest's kernel that connects to `listener` to the daemon that listens at `daemon`, while the block
    runs. The listener is the go-between's from now on."""
    listener.setblocking(False)
    link = DiskLink()
    with listener, contextlib.closing(link):
        async with beside(link.serve(listener, daemon), name="disk"):
            yield link
