"""Hosts that come and go on a virtio-serial port, whose kernel hands over their bytes before it tells of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from katapod.agent.loop import Future, Loop, Task
from katapod.agent.server import Server
from katapod.rpc.framing import FrameDecoder, encode_request
from katapod.rpc.pb import health_pb2


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


class Port:
    """A port from which `read` returns what it was given: bytes, empty for the end of a host."""

    unsent_bytes = 0

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self.answered: list[int] = []
        self.host_gone = False
        self.given: list[bytes] = []

    async def read(self) -> bytes:
        while not self.given:
            await self._loop.turn()
        return self.given.pop(0)

    async def write(self, data: bytes) -> None:
        self.answered += [frame.stream_id for frame in FrameDecoder().feed(data)]

    def host_is_gone(self) -> bool:
        return self.host_gone


def request(stream_id: int) -> bytes:
    return encode_request(stream_id, "grpc.Health", "Check", b"")


class Guest:
    """A server on a port, whose calls are answered once `allowed` is set."""

    def __init__(self, loop: Loop) -> None:
        self.port = Port(loop)
        self.allowed = Future()
        self.server = Server(loop, lambda service, method: self._answer)
        self.server.reset_ids = True
        self._loop = loop

    async def _answer(self, request: Any) -> health_pb2.HealthCheckResponse:
        await self.allowed
        return health_pb2.HealthCheckResponse()

    async def serve(self, *given: bytes, gone: bool) -> None:
        """Until the port has no more to read; `gone`: it says that there is no host."""
        self.port.given, self.port.host_gone = [*given, b""], gone
        assert await self.server.serve(self.port)  # type: ignore[arg-type]

    async def answers(self) -> list[int]:
        await self._turns()  # the port is read
        self.allowed.set()
        await self._turns()
        return self.port.answered

    async def _turns(self) -> None:
        """More than anything here takes: nothing waits for a time, or for another process."""
        for _ in range(100):
            await self._loop.turn()


def test_calls_of_a_host_that_has_gone_are_dropped(loop: Loop) -> None:
    guest = Guest(loop)

    async def main() -> list[int]:
        await guest.serve(request(1), request(3), gone=False)
        return await guest.answers()

    assert loop.run(main()) == []


@pytest.mark.parametrize("former", [(), (request(1), request(3))], ids=["no-former-call", "former-calls"])
def test_what_comes_before_its_host_is_told_of_is_answered(loop: Loop, former: tuple[bytes, ...]) -> None:
    guest = Guest(loop)

    async def main() -> list[int]:
        if former:
            await guest.serve(*former, gone=False)
        await guest.serve(request(1), request(3)[:5], gone=True)  # ended by what is said of the host before it
        guest.port.given, guest.port.host_gone = [request(3)[5:]], False
        Task(loop, "port", guest.server.serve(guest.port))  # type: ignore[arg-type]
        return await guest.answers()

    assert loop.run(main()) == [1, 3]


def test_an_early_host_is_followed_by_another(loop: Loop) -> None:
    guest = Guest(loop)

    async def main() -> list[int]:
        await guest.serve(request(1), request(3), gone=True)
        await guest.serve(request(1), gone=True)  # its number is not greater: another host
        return await guest.answers()

    assert loop.run(main()) == [1]
