"""Which name servers are on a loopback, and what is answered when none answers."""

import pytest

from katapod.sandbox.names import failure, loopback_servers


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("nameserver 127.0.0.11\noptions ndots:0", ("127.0.0.11",)),
        ("nameserver 10.0.0.1\nnameserver\t127.0.0.53 # local\nnameserver 127.0.0.53", ("127.0.0.53",)),
        ("search nameserver 127.0.0.1\n#nameserver 127.0.0.1\nnameserver ::1\nnameserver\nnameserver x", ()),
    ],
)
def test_servers_on_the_loopback(text: str, found: tuple[str, ...]) -> None:
    assert loopback_servers(text.splitlines()) == found


def test_a_failure_is_an_answer() -> None:
    query = bytes.fromhex("abcd 0120 0001 0000 0000 0000") + b"\3web\0\0\1\0\1"
    assert failure(query) == bytes.fromhex("abcd 8122 0001 0000 0000 0000") + b"\3web\0\0\1\0\1"
    assert failure(query[:11]) == b""
