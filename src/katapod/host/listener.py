"""Unix sockets on which this process listens for root alone."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from katapod.model.errors import KatapodError

__all__ = ["bound_listener"]


@contextlib.contextmanager
def bound_listener(path: Path) -> Iterator[socket.socket]:
    """A listening socket for root alone; its file goes when the block ends. Raises KatapodError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as listener:
        try:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()  # left by a supervisor that was killed: the state directory is ours by now
            listener.bind(str(path))
            os.chmod(path, 0o600)
            listener.listen(16)
        except OSError as exc:
            raise KatapodError(f"cannot listen on {path}: {exc.strerror or exc}") from exc
        try:
            yield listener
        finally:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
