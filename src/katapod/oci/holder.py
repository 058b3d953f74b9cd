"""Forks off the process that holds the VM of a new container, and has the first word with it.

It is a fork of `create`, which has loaded next to nothing, in a session of its own: `create` ends, and it stays. Until
it has been told what to create it loads the rest.
"""

from __future__ import annotations

import _socket
import os

from katapod.oci import wire
from katapod.oci.errors import OciError
from katapod.oci.link import Link
from katapod.oci.records import SupervisorDir

TYPE_CHECKING = False
if TYPE_CHECKING:
    from katapod.oci.arguments import Call

__all__ = ["start_supervisor"]

BACKLOG = 64
LISTENER, FIRST = 3, 4  # descriptors in the supervisor: its socket, and the connection of the command that started it


def start_supervisor(call: Call, root: str, sandbox_id: str) -> Link:
    """A connection to a supervisor that has its directory and its lock. Raises OciError; Gone if it ends at once."""
    place = SupervisorDir(root, sandbox_id)
    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    try:
        os.mkdir(place.path, 0o700)
        directory = os.open(place.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        listener.bind(f"/proc/self/fd/{directory}/{place.socket_name}")
        listener.listen(BACKLOG)
        os.close(directory)
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    except OSError as exc:
        listener.close()
        place.remove()
        raise OciError(f"cannot create {place.path}: {os.strerror(exc.errno or 0)}") from exc
    pid = os.fork()
    if pid == 0:
        ours.close()
        _become_supervisor(call, place, sandbox_id, listener.fileno(), theirs.fileno())
    listener.close()
    theirs.close()
    link = Link(ours)
    link.hear()  # that it has the lock
    return link


def _become_supervisor(call: Call, place: SupervisorDir, sandbox_id: str, listener: int, first: int) -> None:
    """The child. Never returns."""
    import fcntl
    import traceback

    status = 1
    try:
        os.setsid()
        lock = os.open(place.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        log = os.open(place.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        kept = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (null, log, listener, first, lock)]
        os.dup2(kept[0], 0)
        os.dup2(kept[1], 1)
        os.dup2(kept[1], 2)
        os.closerange(3, 10)
        os.dup2(kept[2], LISTENER, inheritable=False)
        os.dup2(kept[3], FIRST, inheritable=False)
        last = max(int(name) for name in os.listdir("/proc/self/fd"))
        os.closerange(10, kept[4])  # all but the lock: what its caller has open must not stay open
        os.closerange(kept[4] + 1, last + 1)
        first_link = _socket.socket(fileno=os.dup(FIRST))
        wire.send(first_link, {"locked": True})
        first_link.close()
        from katapod.oci.supervisor import serve_forever

        serve_forever(place, sandbox_id, call.config, LISTENER, FIRST, debug=call.debug)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)
