"""The terminal of a process: made here, and given to whoever asked for one by --console-socket.

Source: docs/terminals.md of opencontainers/runc: one message, the terminal's name, with the master's descriptor
beside it.
"""

import _socket
import array
import fcntl
import os
import termios
import tty
from typing import Any

from katapod.oci.errors import OciError

__all__ = ["make_terminal", "send_descriptor"]


def make_terminal(socket_path: str, size: dict[str, Any] | None) -> int:
    """Make a terminal, send its master, and return the slave: raw, since the guest's own terminal does the rest.
    `size`: process.consoleSize. Raises OciError."""
    master, slave = os.openpty()
    try:
        tty.setraw(slave, termios.TCSANOW)
        if size:
            rows, columns = int(size.get("height", 0)), int(size.get("width", 0))
            fcntl.ioctl(slave, termios.TIOCSWINSZ, array.array("H", [rows & 0xFFFF, columns & 0xFFFF, 0, 0]))
        send_descriptor(socket_path, os.ttyname(slave).encode(), master)
    except OciError:
        os.close(slave)
        raise
    except (OSError, ValueError) as exc:
        os.close(slave)
        raise OciError(f"cannot make a terminal: {exc}") from exc
    finally:
        os.close(master)
    return slave


def send_descriptor(socket_path: str, text: bytes, fd: int) -> None:
    """Send one message, `text` with a descriptor beside it. Raises OciError."""
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    try:
        _connect(connection, socket_path)
        connection.sendmsg([text], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array.array("i", [fd]))])
    except OSError as exc:
        raise OciError(f"cannot send a descriptor to the socket {socket_path}: {exc}") from exc
    finally:
        connection.close()


def _connect(connection: _socket.socket, path: str) -> None:
    """By its directory's descriptor: engines have sockets at paths that sun_path (unix(7)) has no room for."""
    directory = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        connection.connect(f"/proc/self/fd/{directory}/{os.path.basename(path)}")
    finally:
        os.close(directory)
