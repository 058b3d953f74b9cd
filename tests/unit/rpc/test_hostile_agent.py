"""A guest that answers the host's calls with anything: each call ends in bytes or a named error, and nothing is kept.

The guest's side is a socket that sends what it likes; no sizes are trusted, no stream ids, no types.
"""

import asyncio
import gc
import socket

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from katapod.rpc.agent import AgentClient
from katapod.rpc.client import TtrpcClient
from katapod.rpc.framing import DATA_SIZE_MAX, HEADER, encode_frame, encode_response
from katapod.rpc.pb import agent_pb2
from katapod.rpc.status import RpcError, StatusCode
from kit.seeds import seeds

LIMIT_S = 60.0
IDS = (1, 3, 5)
METHODS = ("WaitProcess", "ReadStdout", "StatsContainer")

ids = st.sampled_from((*IDS, *IDS, 0, 2, 7, 2**32 - 1)) | st.integers(0, 2**32 - 1)
payloads = st.binary(max_size=60) | st.sampled_from(
    (b"", b"\x08\x00", b"\x08" + b"\xff" * 9 + b"\x01", b"\x0a\x04" + b"data", b"\xff\xff", b"\x0b" * 80)
)
pieces = st.one_of(
    st.builds(encode_response, ids, payloads),
    st.builds(
        lambda number, code, text: encode_response(number, code=code, message=text),
        ids,
        st.integers(-5, 999),
        st.text(max_size=30),
    ),
    st.builds(encode_frame, ids, st.integers(0, 5), payloads),
    st.builds(lambda number, size: HEADER.pack(size, number, 2, 0), ids, st.integers(0, 2**32 - 1)),
    st.binary(max_size=40),
)


async def answered_with(data: bytes) -> list[object]:
    """What three calls end with when the guest sends `data` and hangs up; nothing of them stays in the client."""
    unseen: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: unseen.append(str(context)))
    ours, theirs = socket.socketpair()
    client = await TtrpcClient.on_socket(ours, "the agent")
    agent = AgentClient(client)
    requests = (agent_pb2.WaitProcessRequest(), agent_pb2.ReadStreamRequest(), agent_pb2.StatsContainerRequest())
    calls = [
        asyncio.create_task(agent.call(method, request, timeout_s=None))
        for method, request in zip(METHODS, requests, strict=True)
    ]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    with theirs:
        theirs.sendall(data)
    async with asyncio.timeout(LIMIT_S):
        ends = await asyncio.gather(*calls, return_exceptions=True)
    assert client._waiting == {}
    assert len(client._decoder._buffer) <= DATA_SIZE_MAX + HEADER.size
    assert client.closed.done()
    client.close()
    await asyncio.sleep(0)
    calls.clear()
    gc.collect(0)
    assert unseen == []
    return list(ends)


def expect_answers_or_named_errors(ends: list[object]) -> None:
    for method, end in zip(METHODS, ends, strict=True):
        if isinstance(end, BaseException):
            assert isinstance(end, RpcError), (method, repr(end))
            assert isinstance(end.code, StatusCode)
            assert len(end.message) < 5000
        else:
            assert type(end).__name__ in ("WaitProcessResponse", "ReadStreamResponse", "StatsContainerResponse")


@pytest.mark.parametrize("data", seeds("to-client"))
async def test_seeds(data: bytes) -> None:
    expect_answers_or_named_errors(await answered_with(data))


@settings(max_examples=150)
@given(st.lists(pieces, max_size=8))
@example([encode_response(1, b"\x08" + b"\xff" * 9 + b"\x01")])
@example([HEADER.pack(2**32 - 1, 1, 2, 0), encode_response(3), encode_response(5)])
def test_anything(sent: list[bytes]) -> None:
    expect_answers_or_named_errors(asyncio.run(answered_with(b"".join(sent))))


async def test_an_endless_answer_is_not_kept() -> None:
    """A guest may stream for ever; what is over the limit is dropped as it comes."""
    ours, theirs = socket.socketpair()
    client = await TtrpcClient.on_socket(ours, "the agent")
    call = asyncio.create_task(client.call_raw("s", "m", b"", LIMIT_S))
    theirs.setblocking(False)
    await asyncio.sleep(0)
    loop, kept = asyncio.get_running_loop(), []
    await loop.sock_sendall(theirs, HEADER.pack(2**32 - 1, 1, 2, 0))
    for _ in range(200):
        await loop.sock_sendall(theirs, bytes(65536))
        kept.append(len(client._decoder._buffer))
    with pytest.raises(RpcError, match="larger than"):
        await call
    assert max(kept) < 1 << 20
    theirs.close()
    client.close()


async def test_unasked_frames_are_not_kept() -> None:
    """Answers to nobody, a hundred thousand: no waiter, no buffer."""
    ours, theirs = socket.socketpair()
    client = await TtrpcClient.on_socket(ours, "the agent")
    theirs.setblocking(False)
    flood = b"".join(encode_response(2 * number + 9, b"x") for number in range(100_000))
    call = asyncio.create_task(client.call_raw("s", "m", b"", LIMIT_S))
    await asyncio.sleep(0)
    await asyncio.get_running_loop().sock_sendall(theirs, flood + encode_response(1, b"mine"))
    assert await call == b"mine"
    assert client._waiting == {}
    assert len(client._decoder._buffer) == 0
    theirs.close()
    client.close()


@pytest.mark.parametrize(
    ("payload", "status"),
    [(b"", 0), (b"\x08\x89\x01", 137), (b"\x08" + b"\xff" * 9 + b"\x01", 255), (b"\x08\xff\xff\xff\xff\x07", 255)],
    ids=["none", "killed", "negative", "huge"],
)
async def test_an_exit_status_is_one_that_a_process_can_have(payload: bytes, status: int) -> None:
    """Events of containerd have no place for another, and would not be sent."""
    ours, theirs = socket.socketpair()
    client = await TtrpcClient.on_socket(ours, "the agent")
    call = asyncio.create_task(AgentClient(client).wait_process("c1", "c1"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    theirs.sendall(encode_response(1, payload))
    assert await call == status
    theirs.close()
    client.close()
