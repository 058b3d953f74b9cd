"""A command's connection to the supervisor of a container."""

from __future__ import annotations

import _socket
import os

from katapod.oci import wire
from katapod.oci.errors import NOT_RUNNING, OciError
from katapod.oci.records import SupervisorDir

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from katapod.oci.records import Record, State

__all__ = ["Link", "ask"]


class Link:
    """Use it as a context manager, or close it."""

    def __init__(self, connection: _socket.socket) -> None:
        self.connection = connection

    @classmethod
    def to(cls, supervisor: SupervisorDir, timeout_s: float | None = None) -> Link:
        """Raises Gone. The way by a descriptor is as short as sun_path of unix(7) needs it, wherever --root is."""
        connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        try:
            directory = os.open(supervisor.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                connection.settimeout(timeout_s)
                connection.connect(f"/proc/self/fd/{directory}/{supervisor.socket_name}")
            finally:
                os.close(directory)
        except OSError as exc:
            connection.close()
            raise wire.Gone(f"the supervisor has gone: {exc}") from exc
        return cls(connection)

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.connection.close()

    def say(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Raises Gone."""
        wire.send(self.connection, message, fds)

    def hear(self) -> dict[str, Any]:
        """The answer. Raises OciError where that is an error; Gone, TimeoutError."""
        answer = wire.receive(self.connection)
        if "error" in answer:
            raise OciError(str(answer["error"]))
        return answer

    def call(self, message: dict[str, Any], fds: Sequence[int] = ()) -> dict[str, Any]:
        """Raises as say and hear."""
        self.say(message, fds)
        return self.hear()

    def wait_end(self) -> None:
        """Until the supervisor has gone: it has removed all by then."""
        try:
            while self.connection.recv(4096):
                pass
        except OSError:
            return


def ask(record: Record, state: State, message: dict[str, Any]) -> dict[str, Any]:
    """What the supervisor of a container, which is in `state`, answers. Raises OciError, also if it has gone."""
    try:
        with Link.to(record.supervisor(state)) as link:
            return link.call({**message, "id": record.id})
    except wire.Gone as exc:
        raise OciError(NOT_RUNNING) from exc
