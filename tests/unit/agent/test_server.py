"""A real agent process on a unix socket: what it answers to good, bad and too many calls."""

from __future__ import annotations

import asyncio
import os
import signal
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

import pytest

import katapod
from katapod.agent.server import CALLS_MAX
from katapod.rpc.agent import AGENT_SERVICE, HEALTH_SERVICE, AgentClient
from katapod.rpc.client import TtrpcClient
from katapod.rpc.framing import Frame, FrameDecoder, encode_request, parse_response
from katapod.rpc.pb import agent_pb2, csi_pb2, health_pb2
from katapod.rpc.status import RpcError, StatusCode
from kit.loop_time import until


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    path = tmp_path / "agent.sock"
    process = subprocess.Popen(
        [sys.executable, "-m", "katapod.agent", "--listen", f"unix://{path}"], stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    line = process.stderr.readline().decode()
    assert f"serves on unix://{path}" in line
    yield str(path)
    process.send_signal(signal.SIGTERM)
    try:
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.fixture
async def agent(address: str) -> AsyncIterator[AgentClient]:
    connection = await TtrpcClient.on_unix_path(address, "agent")
    yield AgentClient(connection)
    connection.close()


async def code_of(agent: AgentClient, method: str, request: object) -> StatusCode:
    with pytest.raises(RpcError) as caught:
        await agent.call(method, request, timeout_s=60)
    return caught.value.code


async def test_health_and_version(agent: AgentClient) -> None:
    await agent.check(60)
    answer = await agent.connection.call(
        HEALTH_SERVICE, "Version", health_pb2.CheckRequest(), health_pb2.VersionCheckResponse, 60
    )
    assert (answer.grpc_version, answer.agent_version) == ("0.0.1", katapod.__version__)


async def test_errors_have_the_protocols_codes(agent: AgentClient) -> None:
    wait = agent_pb2.WaitProcessRequest(container_id="none")
    assert await code_of(agent, "WaitProcess", wait) == StatusCode.INVALID_ARGUMENT
    create = agent_pb2.CreateContainerRequest(container_id="../x")
    assert await code_of(agent, "CreateContainer", create) == StatusCode.INVALID_ARGUMENT
    copy = agent_pb2.CopyFileRequest(path="/etc/x")
    assert await code_of(agent, "CopyFile", copy) == StatusCode.INVALID_ARGUMENT
    resize = agent_pb2.ResizeVolumeRequest(volume_guest_path="/proc", size=1)  # not ext4
    assert await code_of(agent, "ResizeVolume", resize) == StatusCode.UNIMPLEMENTED
    assert await code_of(agent, "SetPolicy", agent_pb2.SetPolicyRequest()) == StatusCode.UNIMPLEMENTED
    routes = agent_pb2.UpdateRoutesRequest()
    assert await code_of(agent, "UpdateRoutes", routes) == StatusCode.INVALID_ARGUMENT
    stats = agent_pb2.VolumeStatsRequest(volume_guest_path="/no/such/path")
    assert await code_of(agent, "GetVolumeStats", stats) == StatusCode.INTERNAL


@pytest.mark.parametrize(
    ("service", "method", "payload", "code"),
    [
        ("grpc.Nothing", "Check", b"", StatusCode.UNIMPLEMENTED),
        (HEALTH_SERVICE, "Nothing", b"", StatusCode.UNIMPLEMENTED),
        (AGENT_SERVICE, "WaitProcess", b"\xff\xff", StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_unknown_and_unreadable_calls(
    agent: AgentClient, service: str, method: str, payload: bytes, code: StatusCode
) -> None:
    with pytest.raises(RpcError) as caught:
        await agent.connection.call_raw(service, method, payload, 60)
    assert caught.value.code == code
    await agent.check(60)


async def test_metrics_and_volume_stats(agent: AgentClient) -> None:
    answer = await agent.call("GetMetrics", agent_pb2.GetMetricsRequest(), 60)
    assert "kata_agent_scrape_count 1\n" in answer.metrics
    request = agent_pb2.VolumeStatsRequest(volume_guest_path="/")
    volume = await agent.connection.call(AGENT_SERVICE, "GetVolumeStats", request, csi_pb2.VolumeStatsResponse, 60)
    assert [usage.unit for usage in volume.usage] == [1, 2]
    assert volume.usage[0].total == os.statvfs("/").f_blocks * os.statvfs("/").f_frsize


async def test_an_oversized_frame_is_refused_and_the_next_is_served(address: str) -> None:
    reader, writer = await asyncio.open_unix_connection(address)
    writer.write(struct.pack(">IIBB", 5 << 20, 1, 1, 0) + bytes(5 << 20))
    writer.write(encode_request(3, HEALTH_SERVICE, "Check", b""))
    decoder = FrameDecoder()
    frames: list[Frame] = []
    async with asyncio.timeout(60):
        while len(frames) < 2:
            frames += decoder.feed(await reader.read(65536))
    with pytest.raises(RpcError) as caught:
        parse_response(next(f for f in frames if f.stream_id == 1))
    assert caught.value.code == StatusCode.RESOURCE_EXHAUSTED
    assert parse_response(next(f for f in frames if f.stream_id == 3)) == b"\x08\x01"
    writer.close()


async def test_nonsense_ends_its_connection_only(address: str, agent: AgentClient) -> None:
    reader, writer = await asyncio.open_unix_connection(address)
    writer.write(b"GET / HTTP/1.1\r\n\r\n")
    async with asyncio.timeout(60):
        assert await reader.read() == b""
    writer.close()
    await agent.check(60)


def have_sent(connection: TtrpcClient, calls: int) -> bool:
    return len(connection._waiting) == calls


async def test_calls_beyond_the_limit_are_refused(agent: AgentClient) -> None:
    polls = [
        asyncio.create_task(agent.call("GetOOMEvent", agent_pb2.GetOOMEventRequest(), timeout_s=None))
        for _ in range(CALLS_MAX)
    ]
    await until(partial(have_sent, agent.connection, CALLS_MAX))
    with pytest.raises(RpcError) as caught:
        await agent.check(60)
    assert caught.value.code == StatusCode.RESOURCE_EXHAUSTED
    assert not any(poll.done() for poll in polls)
    for poll in polls:
        poll.cancel()
    await asyncio.gather(*polls, return_exceptions=True)


async def test_calls_of_a_host_that_has_gone_are_dropped(address: str) -> None:
    for _ in range(3):
        connection = await TtrpcClient.on_unix_path(address, "agent")
        polls = [asyncio.create_task(connection.call_raw(AGENT_SERVICE, "GetOOMEvent", b"", None)) for _ in range(200)]
        await until(partial(have_sent, connection, 200))
        connection.close()
        results = await asyncio.gather(*polls, return_exceptions=True)
        assert all(isinstance(r, RpcError) and r.code == StatusCode.UNAVAILABLE for r in results)
    connection = await TtrpcClient.on_unix_path(address, "agent")
    await AgentClient(connection).check(60)
    connection.close()
