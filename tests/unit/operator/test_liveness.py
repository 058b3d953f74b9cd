"""The liveness endpoint, as kopf serves it for a controller."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any, cast

import aiohttp
import kopf
import pytest
from kopf._core.engines.indexing import OperatorIndexers
from kopf._core.engines.probing import health_reporter

from katapod.operator.cluster.client import ClusterClient
from katapod.operator.cluster.controller import Controller
from katapod.operator.cluster.errors import ClusterFailed
from katapod.operator.cluster.objects import Settings
from kit.loop_time import until


class Client:
    """An API server of which only the lease is asked for, and how often."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.asked = 0

    async def read_lease(self, name: str) -> None:
        self.asked += 1
        raise self.error

    async def close(self) -> None:
        pass


@contextlib.asynccontextmanager
async def started(client: Client) -> AsyncIterator[str]:
    """A controller; gives the URL of its endpoint."""
    controller = Controller(
        cast(ClusterClient, client), Settings("katapod", "node", "1"), "one", webhook_port=None, machine=False
    )
    registry = kopf.OperatorRegistry()
    controller.register(registry)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/healthz"
    ready = asyncio.Event()
    indices: Any = OperatorIndexers().indices
    memo: Any = kopf.Memo()
    reporter = asyncio.create_task(
        health_reporter(
            url,
            memo=memo,
            indices=indices,
            registry=registry,
            settings=kopf.OperatorSettings(),
            ready_flag=ready,
        )
    )
    await controller._start()
    try:
        await ready.wait()
        yield url
    finally:
        await controller._stop()
        reporter.cancel()
        await asyncio.wait({reporter})


async def status(url: str) -> int:
    async with aiohttp.ClientSession() as session, session.get(url) as answered:
        return answered.status


async def test_an_api_server_that_is_away_does_not_end_the_operator() -> None:
    client = Client(ClusterFailed("no answer"))
    async with started(client) as url:
        await until(lambda: client.asked)
        assert await status(url) == 200


async def test_one_of_whose_tasks_has_ended_is_started_again(caplog: pytest.LogCaptureFixture) -> None:
    client = Client(TypeError("a defect"))
    async with started(client) as url:
        await until(lambda: client.asked)
        assert await status(url) == 500
    assert "the task election has ended" in caplog.text
