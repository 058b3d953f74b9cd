"""What only our own agent does is refused with an agent that does not say that it does."""

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from katapod.agent.guest import get_guest_details
from katapod.model.errors import SpecError
from katapod.rpc.agent import AgentClient
from katapod.rpc.client import TtrpcClient
from katapod.rpc.features import FEATURES, SECCOMP_DEFAULT_ERRNO, UMASK
from katapod.rpc.pb import agent_pb2, oci_pb2
from katapod.rpc.server import serve_ttrpc
from katapod.sandbox.client import require_features, start_exec


async def test_an_agent_is_asked_once_and_only_when_it_matters(tmp_path: Path) -> None:
    features: list[str] = []
    calls: list[str] = []

    async def handle(service: str, method: str, payload: bytes) -> bytes:
        calls.append(method)
        details = agent_pb2.AgentDetails(extra_features=features)
        return agent_pb2.GuestDetailsResponse(agent_details=details).SerializeToString()

    path = str(tmp_path / "agent.sock")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    server = await serve_ttrpc(listener, handle)
    older = AgentClient(await TtrpcClient.on_unix_path(path, "the agent"))
    await require_features(older, frozenset())
    assert calls == []
    with pytest.raises(SpecError, match=r"cannot set linux\.seccomp\.defaultErrnoRet: the agent in the guest image"):
        await require_features(older, frozenset({SECCOMP_DEFAULT_ERRNO}))
    process = oci_pb2.Process(User=oci_pb2.User(Umask=0o77))
    with pytest.raises(SpecError, match=r"cannot set process\.user\.umask: "):
        await start_exec(older, "c1", process, user="")
    assert calls == ["GetGuestDetails"]
    features[:] = FEATURES
    ours = AgentClient(await TtrpcClient.on_unix_path(path, "the agent"))
    await require_features(ours, frozenset({UMASK}))
    await start_exec(ours, "c1", process, user="")
    assert calls == ["GetGuestDetails", "GetGuestDetails", "ExecProcess"]
    for client in (older, ours):
        client.connection.close()
    server.close()


async def test_our_agent_says_what_it_does() -> None:
    agent: Any = SimpleNamespace(is_init=True)
    answer = await get_guest_details(agent, agent_pb2.GuestDetailsRequest())
    assert list(answer.agent_details.extra_features) == list(FEATURES)
