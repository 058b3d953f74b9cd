"""The share: a go-between (go_between.py) before virtiofsd, which has no configuration to be asked for.

Source: Virtual I/O Device (VIRTIO) 1.2, section 5.11.
"""

import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path

from katapod.tasks import beside
from katapod.vmm.uml.go_between import GoBetween
from katapod.vmm.uml.vhost_user import VhostUserFailed

__all__ = ["SHARE_ID", "Share", "joining_share"]

SHARE_ID = 26  # of this kind of device, for virtio_uml.device=SOCKET:ID
TAG_MAX = 36  # bytes
_QUEUES = struct.Struct("<I")


class Share(GoBetween):
    what = "share"
    daemon_name = "virtiofsd"

    def __init__(self, tag: str) -> None:
        super().__init__(tag.encode().ljust(TAG_MAX, b"\0") + _QUEUES.pack(1))


@contextlib.asynccontextmanager
async def joining_share(listener: socket.socket, virtiofsd: Path | socket.socket, tag: str) -> AsyncIterator[Share]:
    """Join the first guest's kernel that connects to `listener` to a virtiofsd, while the block runs.

    `virtiofsd` is the daemon's socket, or where it listens; `tag` the name by which the guest mounts, of at most 36
    bytes. Both sockets are the go-between's from now on. The daemon ends by itself when the guest has gone.
    """
    if not 0 < len(tag.encode()) <= TAG_MAX:
        raise VhostUserFailed(f"cannot join a share: its tag {tag!r} does not have 1 to {TAG_MAX} bytes")
    listener.setblocking(False)
    share = Share(tag)
    with contextlib.ExitStack() as stack:
        stack.enter_context(listener)
        if isinstance(virtiofsd, socket.socket):
            stack.enter_context(virtiofsd)
        stack.callback(share.close)
        async with beside(share.serve(listener, virtiofsd), name="share"):
            yield share
