"""Online growth of mounted volumes: ext4, by an ioctl. Source: linux/Documentation/filesystems/ext4."""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from katapod.agent.stats import read_text
from katapod.rpc.status import RpcError, StatusCode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from katapod.agent.sandbox import Agent
    from katapod.rpc.pb import agent_pb2

__all__ = ["resize_volume"]

EXT4_IOC_RESIZE_FS = 0x40086610  # takes the new number of blocks
SECTOR = 512
DEVICE_LIMIT_S, PAUSE_S = 3.0, 0.02


async def resize_volume(agent: Agent, request: agent_pb2.ResizeVolumeRequest) -> None:
    """Raises OSError if the path does not exist, RpcError."""
    path, size = request.volume_guest_path, request.size
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        device = os.fstat(fd).st_dev
        for _ in range(int(DEVICE_LIMIT_S / PAUSE_S)):  # the driver learns of the new size a moment later
            have = int(read_text(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/size") or 0) * SECTOR
            if have >= size or not have:
                break
            await agent.loop.sleep(PAUSE_S)
        if 0 < have < size:
            raise RpcError(
                StatusCode.FAILED_PRECONDITION, f"cannot resize {path} to {size} bytes: its device has {have}"
            )
        fcntl.ioctl(fd, EXT4_IOC_RESIZE_FS, struct.pack("Q", size // os.fstatvfs(fd).f_bsize))
    except OSError as exc:
        if exc.errno == errno.ENOTTY:
            raise RpcError(StatusCode.UNIMPLEMENTED, f"cannot resize {path}: only ext4 can grow") from exc
        if exc.errno == errno.EINVAL:
            raise RpcError(
                StatusCode.INVALID_ARGUMENT, f"cannot resize {path} to {size} bytes: it cannot shrink"
            ) from exc
        raise
    finally:
        os.close(fd)
