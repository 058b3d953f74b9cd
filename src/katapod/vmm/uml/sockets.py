"""Sockets of a machine's virtio devices, in directories of the host."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from katapod.vmm.errors import VmmFailed

__all__ = ["listening", "short_path"]


@contextlib.contextmanager
def listening(path: Path, uid: int) -> Iterator[socket.socket]:
    """A socket that only the user `uid` may connect to; its name goes at the end. Raises VmmFailed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as listener:
        try:
            path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            with short_path(path) as address:
                listener.bind(address)
            path.chmod(0o600)
            os.chown(path, uid, uid)
            listener.listen(1)
        except OSError as exc:
            raise VmmFailed(f"cannot listen on {path} for User-mode Linux: {exc.strerror}") from exc
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def short_path(path: Path) -> Iterator[str]:
    """A name for the socket `path`: a cache directory may lie anywhere, and an address has room for 107 bytes. Raises
    OSError."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
