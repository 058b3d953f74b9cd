"""The messages between commands and the supervisor."""

import socket

from katapod.oci import wire


class _Quick(socket.socket):
    """Its other side has read, and has gone, before we go on."""

    other: socket.socket

    def sendmsg(self, *arguments: object) -> int:
        sent = super().sendmsg(*arguments)  # type: ignore[arg-type]
        assert self.other.recv(65536)
        self.other.close()
        return sent


def test_a_message_that_has_arrived_is_sent() -> None:
    """A supervisor ends as soon as it has deleted its last container."""
    ours, theirs = socket.socketpair()
    with _Quick(fileno=ours.detach()) as connection:
        connection.other = theirs
        wire.send(connection, {"do": "delete"})
