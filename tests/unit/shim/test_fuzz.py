"""Whatever comes to the shim's socket: an error for who sent it, nothing for the others, and no memory kept.

Ids, bundles and streams that tests make up are never ones that exist.
"""

import asyncio
import contextlib
import itertools
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shim_guest_helper import Shim, shim_at

from katapod.rpc.client import TtrpcClient
from katapod.rpc.framing import (
    DATA_SIZE_MAX,
    HEADER,
    REQUEST,
    FrameDecoder,
    encode_frame,
    encode_request,
    parse_response,
)
from katapod.rpc.server import CALLS_PER_CONNECTION_MAX
from katapod.rpc.status import RpcError, StatusCode
from katapod.shim.pb import task_pb2
from katapod.shim.service import SERVICES
from kit.seeds import seeds

METHODS = (
    *("State", "Create", "Start", "Delete", "Pids", "Pause", "Resume", "Checkpoint", "Kill", "Exec", "ResizePty"),
    *("CloseIO", "Update", "Wait", "Stats", "Connect"),
)
BOUNDED = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
LIMIT_S = 60.0
QUIET_S = 0.02
"""How long a peer that need not be answered is listened to."""

services = st.sampled_from((*SERVICES, "containerd.task.v1.Task", "", "x" * 300))
methods = st.sampled_from((*METHODS, "", "Fly"))
texts = st.text(max_size=20)


@pytest.fixture
async def shim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Shim]:
    async with shim_at(tmp_path, monkeypatch) as found:
        await found.create("c1", start=True)
        yield found


async def exchange(shim: Shim, data: bytes, answers: int = 0) -> list[tuple[int, int]]:
    """Send bytes on a connection of their own; returns (stream id, status code) of each answer.

    Reads until there are `answers`, or the server hangs up; without a number, for a moment. Whatever comes of it,
    another connection is served as before.
    """
    found: list[tuple[int, int]] = []
    reader, writer = await asyncio.open_unix_connection(shim.path)
    decoder = FrameDecoder()
    with contextlib.suppress(ConnectionError, TimeoutError):
        writer.write(data)
        async with asyncio.timeout(LIMIT_S if answers else QUIET_S):
            while not answers or len(found) < answers:
                chunk = await reader.read(65536)
                if not chunk:
                    break
                for frame in decoder.feed(chunk):
                    code = 0
                    try:
                        parse_response(frame)
                    except RpcError as exc:
                        code = exc.code
                    found.append((frame.stream_id, code))
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    assert (await shim.call("State", id="c1")).status == task_pb2.RUNNING
    return found


class Together:
    """A loop and a shim for all examples of a test: hypothesis calls a plain function for each."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runner = asyncio.Runner()
        self.stack = contextlib.AsyncExitStack()
        self.shim = self.runner.run(self._open(folder, monkeypatch))

    async def _open(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Shim:
        shim = await self.stack.enter_async_context(shim_at(folder, monkeypatch))
        await shim.create("c1", start=True)
        return shim

    def exchange(self, data: bytes, answers: int = 0) -> list[tuple[int, int]]:
        return self.runner.run(exchange(self.shim, data, answers))

    def close(self) -> None:
        self.runner.run(self.stack.aclose())
        self.runner.close()


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Together]:
    found = Together(tmp_path, monkeypatch)
    yield found
    found.close()


@pytest.mark.parametrize("data", seeds("to-server"))
async def test_seeds(shim: Shim, data: bytes) -> None:
    for _, code in await exchange(shim, data):
        assert code != StatusCode.INTERNAL


@BOUNDED
@given(st.binary(max_size=600))
def test_random_bytes(served: Together, data: bytes) -> None:
    served.exchange(data)


@BOUNDED
@given(service=services, method=methods, payload=st.binary(max_size=200), number=st.integers(0, 2**32 - 1))
def test_random_requests(served: Together, service: str, method: str, payload: bytes, number: int) -> None:
    """Each is answered, and never as if the shim had failed: INTERNAL stands for what was not foreseen."""
    found = served.exchange(encode_request(number, service, method, payload), answers=1)
    assert [stream for stream, _ in found] == [number]
    assert found[0][1] != StatusCode.INTERNAL


@BOUNDED
@given(
    data=st.data(),
    method=st.sampled_from(METHODS),
    flips=st.lists(st.tuples(st.integers(0, 400), st.integers(1, 255)), min_size=1, max_size=4),
)
def test_good_requests_gone_wrong(
    served: Together, data: st.DataObject, method: str, flips: list[tuple[int, int]]
) -> None:
    """Bits flipped anywhere, the header too."""
    request = task_pb2.CreateTaskRequest(id="z" * 20, bundle="/nowhere", stdin="/nowhere/0", stdout="binary:///nowhere")
    frame = bytearray(encode_request(1, SERVICES[0], method, request.SerializeToString()))
    for place, flip in flips:
        frame[place % len(frame)] ^= flip
    cut = data.draw(st.integers(0, len(frame)))
    for _, code in served.exchange(bytes(frame[:cut])):
        assert code != StatusCode.INTERNAL


@BOUNDED
@given(
    container_id=texts | st.just("c1"),
    exec_id=texts,
    stdin=texts,
    stdout=texts.map("binary://".__add__) | texts.map("file:".__add__) | texts,
    value=st.binary(max_size=60),
    number=st.integers(0, 2**32 - 1),
)
def test_well_formed_nonsense(
    served: Together, container_id: str, exec_id: str, stdin: str, stdout: str, value: bytes, number: int
) -> None:
    """Texts of all kinds in fields that are looked at."""
    bundle = f"/nowhere/{container_id}"
    requests = {
        "Create": task_pb2.CreateTaskRequest(
            id=container_id, bundle=bundle, stdin=stdin, stdout=stdout, options={"type_url": exec_id, "value": value}
        ),
        "State": task_pb2.StateRequest(id=container_id, exec_id=exec_id),
        "Exec": task_pb2.ExecProcessRequest(
            id=container_id, exec_id=exec_id, stdin=stdin, stdout=stdout, spec={"value": value}
        ),
        "Update": task_pb2.UpdateTaskRequest(id=container_id, resources={"value": value}),
        "ResizePty": task_pb2.ResizePtyRequest(id=container_id, exec_id=exec_id, width=number, height=number),
        "CloseIO": task_pb2.CloseIORequest(id=container_id, exec_id=exec_id or "none", stdin=True),
        "Kill": task_pb2.KillRequest(id=container_id, exec_id=exec_id or "none", signal=number),
    }
    frames = [
        encode_request(2 * index + 1, SERVICES[0], method, request.SerializeToString())
        for index, (method, request) in enumerate(requests.items())
    ]
    found = served.exchange(b"".join(frames), answers=len(frames))
    assert sorted(stream for stream, _ in found) == list(range(1, 2 * len(frames), 2))
    assert StatusCode.INTERNAL not in {code for _, code in found}


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (encode_request(2, SERVICES[0], "State", b""), StatusCode.INVALID_ARGUMENT),  # an even id
        (encode_frame(3, 2, b""), StatusCode.INVALID_ARGUMENT),  # a response
        (encode_frame(3, 3, b"data"), StatusCode.INVALID_ARGUMENT),  # data of no stream
        (encode_frame(3, REQUEST, b"\xff\xff"), StatusCode.INVALID_ARGUMENT),
        (encode_request(3, SERVICES[0], "State", b"\xff"), StatusCode.INVALID_ARGUMENT),
        (encode_request(3, SERVICES[0], "Fly", b""), StatusCode.UNIMPLEMENTED),
        (encode_request(3, "a.B", "State", b""), StatusCode.UNIMPLEMENTED),
        (encode_request(3, SERVICES[0], "State", b"\x0a\x01\xff"), StatusCode.INVALID_ARGUMENT),  # not UTF-8
        (encode_request(3, SERVICES[0], "State", b"\x08\x07"), StatusCode.NOT_FOUND),  # a number for the id
        (HEADER.pack(DATA_SIZE_MAX + 1, 3, REQUEST, 0) + bytes(DATA_SIZE_MAX + 1), StatusCode.RESOURCE_EXHAUSTED),
    ],
)
async def test_what_each_is_answered(shim: Shim, frame: bytes, code: StatusCode) -> None:
    """The connection goes on: the next call of the same peer is served."""
    good = encode_request(5, SERVICES[0], "Connect", b"")
    found = await exchange(shim, frame + good, answers=2)
    stream = struct.unpack_from(">I", frame, 4)[0]
    assert dict(found) == {stream: code, 5: 0}


@pytest.mark.parametrize("second", [1, 3, 5])
async def test_a_stream_id_is_used_once(shim: Shim, second: int) -> None:
    """They only go up; the one before goes on."""
    wait = encode_request(5, SERVICES[0], "Wait", task_pb2.WaitRequest(id="c1").SerializeToString())
    again = encode_request(second, SERVICES[0], "Connect", b"")
    good = encode_request(7, SERVICES[0], "Connect", b"")
    found = await exchange(shim, wait + again + good, answers=2)
    assert dict(found) == {second: StatusCode.INVALID_ARGUMENT, 7: 0}


@pytest.mark.parametrize("nanoseconds", [20_000_000, 1, -1, -(2**63)])
async def test_a_call_ends_at_its_time_limit(shim: Shim, nanoseconds: int) -> None:
    """The caller's own, in the request; the task and the calls of others go on."""
    request = task_pb2.WaitRequest(id="c1").SerializeToString()
    frame = encode_request(1, SERVICES[0], "Wait", request, timeout_nano=nanoseconds)
    other = asyncio.create_task(shim.call("Wait", id="c1"))
    assert await exchange(shim, frame, answers=1) == [(1, StatusCode.DEADLINE_EXCEEDED)]
    assert not other.done()
    shim.guest.processes["c1"].end(3)
    assert (await other).exit_status == 3


async def test_a_time_limit_that_is_kept_changes_nothing(shim: Shim) -> None:
    request = task_pb2.StateRequest(id="c1").SerializeToString()
    frames = [
        encode_request(number, SERVICES[0], "State", request, timeout_nano=limit)
        for number, limit in ((1, 10**12), (3, 2**63 - 1))
    ]
    assert sorted(await exchange(shim, b"".join(frames), answers=2)) == [(1, 0), (3, 0)]


async def test_a_type_that_does_not_exist_ends_the_connection(shim: Shim) -> None:
    assert await exchange(shim, HEADER.pack(0, 1, 9, 0), answers=1) == []


async def test_a_message_that_never_ends_is_not_kept(shim: Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest length there is: what comes is thrown away as it comes."""
    kept: list[int] = []
    feed = FrameDecoder.feed

    def watched(self: FrameDecoder, data: bytes) -> list[object]:
        frames = feed(self, data)
        kept.append(len(self._buffer))
        return frames  # type: ignore[return-value]

    monkeypatch.setattr(FrameDecoder, "feed", watched)
    found = await exchange(shim, HEADER.pack(2**32 - 1, 1, REQUEST, 0) + bytes(8 << 20), answers=1)
    assert found == [(1, StatusCode.RESOURCE_EXHAUSTED)]
    assert max(kept) < 1 << 20


async def test_a_peer_that_asks_and_never_reads_is_not_listened_to(shim: Shim) -> None:
    """What it is to be answered would be kept for it without a limit."""
    loop = asyncio.get_running_loop()
    sent, limit, numbers = 0, 32 << 20, itertools.count(1, 2)
    with socket.socket(socket.AF_UNIX) as peer:
        peer.setblocking(False)
        await loop.sock_connect(peer, shim.path)
        with contextlib.suppress(TimeoutError):
            while sent < limit:
                question = encode_request(next(numbers), SERVICES[0], "Fly" * 1000, b"")  # the answer names the method
                async with asyncio.timeout(0.3):
                    await loop.sock_sendall(peer, question)
                sent += len(question)
        assert sent < limit
        assert (await shim.call("State", id="c1")).status == task_pb2.RUNNING, "another connection"


async def test_too_many_calls_at_once_are_refused_and_the_rest_answered(shim: Shim) -> None:
    client: TtrpcClient = await shim.connect()
    waiting = [
        asyncio.create_task(shim.call("Wait", via=client, id="c1")) for _ in range(CALLS_PER_CONNECTION_MAX + 20)
    ]
    done, _ = await asyncio.wait(waiting, timeout=LIMIT_S, return_when=asyncio.FIRST_COMPLETED)
    assert done
    assert (await shim.call("State", id="c1")).status == task_pb2.RUNNING, "another connection"
    shim.guest.processes["c1"].end(4)
    ends = await asyncio.gather(*waiting, return_exceptions=True)
    refused = [end.code for end in ends if isinstance(end, RpcError)]
    assert refused == [StatusCode.RESOURCE_EXHAUSTED] * 20
    assert {end.exit_status for end in ends if not isinstance(end, BaseException)} == {4}
    client.close()
