"""Events reach containerd in order, also one that was away."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from katapod.rpc.server import serve_ttrpc
from katapod.rpc.status import RpcError, StatusCode
from katapod.shim import events as events_module
from katapod.shim.events import EventPublisher
from katapod.shim.pb import events_pb2


class Receiver:
    """containerd's side."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.envelopes: list[events_pb2.Envelope] = []

    async def handle(self, service: str, method: str, payload: bytes) -> bytes:
        assert (service, method) == ("containerd.services.events.ttrpc.v1.Events", "Forward")
        self.envelopes.append(events_pb2.ForwardRequest.FromString(payload).envelope)
        return b""

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.path))
        listener.listen()
        server = await serve_ttrpc(listener, self.handle)
        try:
            yield
        finally:
            server.close()
            self.path.unlink(missing_ok=True)  # from Python 3.13 on the server does so


@pytest.fixture
def receiver(tmp_path: Path) -> Receiver:
    return Receiver(tmp_path / "events.sock")


def start(number: int) -> events_pb2.TaskStart:
    return events_pb2.TaskStart(container_id=f"c{number}", pid=number)


async def test_in_order_and_as_containerd_reads_them(receiver: Receiver) -> None:
    async with receiver.serving():
        publisher = EventPublisher(str(receiver.path), "k8s.io")
        for number in range(50):
            publisher.publish("/tasks/start", start(number))
        await publisher.drain(60)
        await publisher.close()
    assert len(receiver.envelopes) == 50
    first = receiver.envelopes[0]
    assert (first.namespace, first.topic, first.event.type_url) == (
        "k8s.io",
        "/tasks/start",
        "containerd.events.TaskStart",
    )
    assert first.timestamp.seconds > 1_700_000_000
    told = [events_pb2.TaskStart.FromString(one.event.value).pid for one in receiver.envelopes]
    assert told == list(range(50))


async def test_containerd_that_comes_back(receiver: Receiver) -> None:
    publisher = EventPublisher(str(receiver.path), "ns")
    publisher.publish("/tasks/start", start(1))
    await asyncio.sleep(0.05)
    async with receiver.serving():
        await publisher.drain(60)
        assert [one.topic for one in receiver.envelopes] == ["/tasks/start"]
    await publisher.close()


async def test_what_nobody_takes_is_given_up(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(events_module, "TRIES", 2)
    publisher = EventPublisher(str(receiver.path), "ns")
    with caplog.at_level(logging.WARNING):
        publisher.publish("/tasks/start", start(1))
        await publisher.drain(60)
    await publisher.close()
    assert "event /tasks/start dropped" in caplog.text


async def test_without_an_address_they_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """As under CRI-O, which has no use for them."""
    publisher = EventPublisher("", "default")
    with caplog.at_level(logging.INFO):
        publisher.publish("/tasks/start", start(7))
    await publisher.drain(1)
    await publisher.close()
    assert "/tasks/start" in caplog.text
    assert "c7" in caplog.text


async def test_order_is_kept_over_restarts_of_containerd(receiver: Receiver) -> None:
    """The connection breaks between events; the next one finds it broken, or nobody there for a while."""
    publisher = EventPublisher(f"unix://{receiver.path}", "ns")
    for round_number in range(3):
        async with receiver.serving():
            publisher.publish("/tasks/start", start(2 * round_number))
            await publisher.drain(60)
        publisher.publish("/tasks/start", start(2 * round_number + 1))
    async with receiver.serving():
        await publisher.drain(60)
    await publisher.close()
    told = [events_pb2.TaskStart.FromString(one.event.value).pid for one in receiver.envelopes]
    assert list(dict.fromkeys(told)) == list(range(6))
    stamps = [(one.timestamp.seconds, one.timestamp.nanos) for one in receiver.envelopes]
    assert stamps == sorted(stamps)


async def test_what_containerd_refuses_holds_up_nothing_for_ever(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(events_module, "TRIES", 2)
    taken = receiver.handle

    async def refuse_first(service: str, method: str, payload: bytes) -> bytes:
        if b"c1" in payload:
            raise RpcError(StatusCode.INVALID_ARGUMENT, "not that one")
        return await taken(service, method, payload)

    monkeypatch.setattr(receiver, "handle", refuse_first)
    async with receiver.serving():
        publisher = EventPublisher(str(receiver.path), "ns")
        for number in (1, 2):
            publisher.publish("/tasks/start", start(number))
        await publisher.drain(60)
        await publisher.close()
    assert [events_pb2.TaskStart.FromString(one.event.value).pid for one in receiver.envelopes] == [2]
    assert "dropped: not that one" in caplog.text


async def test_of_too_many_events_the_oldest_go(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(events_module, "QUEUE_MAX", 4)
    publisher = EventPublisher(str(receiver.path), "ns")
    for number in range(10):
        publisher.publish("/tasks/start", start(number))
    async with receiver.serving():
        await publisher.drain(60)
    await publisher.close()
    told = [events_pb2.TaskStart.FromString(one.event.value).pid for one in receiver.envelopes]
    assert told == [6, 7, 8, 9]
    assert caplog.text.count("event dropped") == 6


def exit_of(number: int) -> events_pb2.TaskExit:
    return events_pb2.TaskExit(container_id=f"c{number}", id=f"c{number}", pid=number)


async def test_an_exit_is_never_dropped(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "QUEUE_MAX", 4)
    publisher = EventPublisher(str(receiver.path), "ns")
    for number in range(8):
        publisher.publish("/tasks/start", start(number))
        publisher.publish("/tasks/exit", exit_of(number))
    async with receiver.serving():
        await publisher.drain(60)
    await publisher.close()
    assert [one.topic for one in receiver.envelopes] == ["/tasks/exit"] * 8
    assert [events_pb2.TaskExit.FromString(one.event.value).pid for one in receiver.envelopes] == list(range(8))


async def test_an_exit_waits_for_containerd_however_long(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "TRIES", 2)
    monkeypatch.setattr(events_module, "PAUSE_MAX_S", 0.01)
    publisher = EventPublisher(str(receiver.path), "ns")
    publisher.publish("/tasks/exit", exit_of(1))
    await asyncio.sleep(0.2)  # some 20 tries
    async with receiver.serving():
        await publisher.drain(60)
    await publisher.close()
    assert [one.topic for one in receiver.envelopes] == ["/tasks/exit"]


async def test_an_exit_that_containerd_refuses_is_given_up(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(events_module, "TRIES", 2)

    async def refuse(service: str, method: str, payload: bytes) -> bytes:
        raise RpcError(StatusCode.INVALID_ARGUMENT, "not that one")

    monkeypatch.setattr(receiver, "handle", refuse)
    async with receiver.serving():
        publisher = EventPublisher(str(receiver.path), "ns")
        publisher.publish("/tasks/exit", exit_of(1))
        await publisher.drain(60)
        await publisher.close()
    assert "event /tasks/exit dropped: not that one" in caplog.text


async def test_one_oom_of_a_container_waits_at_a_time(receiver: Receiver) -> None:
    publisher = EventPublisher(str(receiver.path), "ns")
    for _ in range(50):
        for name in ("a", "b"):
            publisher.publish("/tasks/oom", events_pb2.TaskOOM(container_id=name))
    async with receiver.serving():
        await publisher.drain(60)
    await publisher.close()
    assert [events_pb2.TaskOOM.FromString(one.event.value).container_id for one in receiver.envelopes] == ["a", "b"]


async def test_a_drain_that_takes_too_long_is_left(receiver: Receiver) -> None:
    publisher = EventPublisher(str(receiver.path), "ns")
    publisher.publish("/tasks/start", start(1))
    async with asyncio.timeout(60):
        await publisher.drain(0.05)
    await publisher.close()
    async with receiver.serving():
        await asyncio.sleep(0.05)
    assert receiver.envelopes == [], "nothing is sent after the end"
