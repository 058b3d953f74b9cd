"""Starts the process that stands on the host for one in the guest (host/proxy.c), as a child of the command.

When the command ends, the proxy is the child of whoever called it, if that is a subreaper (prctl(2)), as all engines'
helpers are. It has a session of its own, and the terminal if there is one, so that it hears of changes of size.
"""

from __future__ import annotations

import _socket
import os
import sys

import katapod
from katapod.oci.errors import OciError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

__all__ = ["PROGRAM", "Proxy", "start_proxy"]

PROGRAM = os.path.join(os.path.dirname(katapod.__file__), "host", "katapod-proxy")
SUPERVISOR, PLACES, TERMINAL = 3, {"netns": 4, "mounts": 5, "pids": 6}, 7  # descriptors, as in proxy.c
READY = 5  # bytes: its process id, and the word that it is in place
ABOVE = 16  # descriptors that are to be copied to those numbers are out of their way here


class Proxy:
    """`end`: of its connection, for the supervisor; the caller's to close. `foreground_terminal`: the process that it
    stands for has the caller's own terminal."""

    def __init__(self, pid: int, end: int) -> None:
        self.pid = pid
        self.end = end
        self.foreground_terminal = False


def start_proxy(names: Sequence[str], place: Mapping[str, Any], terminal: int | None) -> Proxy:
    """`names`: shown by ps(1). `place`: where it is to be: `netns`, `mounts`, `pids` are paths of namespaces, empty for
    none; `cgroups` are directories. Raises OciError."""
    opened: dict[int, int] = {}
    try:
        for name, number in PLACES.items():
            if place.get(name):
                opened[number] = os.open(str(place[name]), os.O_RDONLY | os.O_CLOEXEC)
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        wanted = {**opened, SUPERVISOR: theirs.fileno(), **({TERMINAL: terminal} if terminal is not None else {})}
        pid = os.fork()
        if pid == 0:
            try:
                _become_proxy(names, wanted, place["cgroups"])
            except BaseException as exc:
                os.write(theirs.fileno(), str(exc).encode() or b"?")
            finally:
                os._exit(125)
        theirs.close()
    except OSError as exc:
        raise OciError(f"cannot start a process for {names[0]} in its namespaces: {exc}") from exc
    finally:
        for fd in opened.values():
            os.close(fd)
    os.waitpid(pid, 0)  # it has forked, and its child is ours
    said = _read(ours)
    if len(said) != READY:
        ours.close()
        raise OciError(f"cannot start {PROGRAM}: {said.decode(errors='replace') or 'it ended at once'}")
    return Proxy(int.from_bytes(said[:-1], sys.byteorder), ours.detach())


def _read(connection: _socket.socket) -> bytes:
    """What it says at first: READY bytes, the last 0; or why it failed."""
    data = b""
    while piece := connection.recv(4096):
        data += piece
        if len(data) == READY and data[-1] == 0:
            break
    return data


def _become_proxy(names: Sequence[str], wanted: dict[int, int], cgroups: Sequence[str]) -> None:
    """In the child: descriptors, by the numbers that they are to have, and nothing else. Raises OSError."""
    import fcntl

    for directory in cgroups:
        with open(f"{directory}/cgroup.procs", "w") as handle:
            handle.write("0")  # the writing process
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    wanted = {**wanted, 0: null, 1: null, 2: null}
    moved = {number: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, ABOVE) for number, fd in wanted.items()}
    os.closerange(SUPERVISOR, ABOVE)
    for number, fd in moved.items():
        os.dup2(fd, number)
    os.chdir("/")
    # what callers let us inherit must not be held open by a process that stays
    os.closerange(ABOVE, max(1024, *(int(name) + 1 for name in os.listdir("/proc/self/fd"))))
    os.execv(PROGRAM, ["katapod-proxy", *names])  # noqa: S606
