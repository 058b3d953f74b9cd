"""The guest's part of a sandbox's metrics: asked for, bounded, and never waited for at the cost of the host's part."""

import asyncio
import logging
import time
from typing import Any, Protocol

from katapod.model.guest_metrics import guest_metrics
from katapod.rpc.pb import agent_pb2
from katapod.rpc.status import RpcError, StatusCode
from katapod.tasks import Background

__all__ = ["AgentCalls", "GuestFigures"]

log = logging.getLogger(__name__)

ANSWER_LIMIT_S = 4.0
PATIENCE_S = 0.75  # less than what kata-monitor gives the slowest, so that the host's part is there
KEPT_S = 60.0


class AgentCalls(Protocol):
    """Part of AgentClient."""

    async def call(self, method: str, request: Any, timeout_s: float | None = ...) -> Any: ...


class HasAgent(Protocol):
    """Part of management.ObservedSandbox."""

    @property
    def sandbox_id(self) -> str: ...
    @property
    def agent(self) -> AgentCalls: ...


class GuestFigures:
    """A guest that takes longer than `patience_s` is told a scrape late: its answer is kept for the next."""

    def __init__(self, managed: HasAgent, patience_s: float | None = None) -> None:
        self._managed = managed
        self._patience_s = PATIENCE_S if patience_s is None else patience_s
        self._agent_has_metrics = True
        self._background = Background()
        self._asking: asyncio.Task[str] | None = None
        self._asked_at = 0.0
        self._warned = False

    async def text(self, *, whole: bool = False) -> str:
        """Lines that are the guest's to say; empty if it says nothing, or not in time. With `whole` it has longer."""
        asking, late = self._asking, time.monotonic() - self._asked_at > KEPT_S
        if asking is None or (asking.done() and late):
            asking = self._asking = self._background.start(self._ask(), name="guest-metrics")
            self._asked_at = time.monotonic()
        await asyncio.wait({asking}, timeout=ANSWER_LIMIT_S if whole else self._patience_s)
        if not asking.done():
            return ""
        if self._asking is asking:
            self._asking = None
        return "" if asking.cancelled() else asking.result()

    async def _ask(self) -> str:
        if not self._agent_has_metrics:
            return ""
        try:
            request = agent_pb2.GetMetricsRequest()
            answer = await self._managed.agent.call("GetMetrics", request, timeout_s=ANSWER_LIMIT_S)
        except RpcError as exc:
            if exc.code in (StatusCode.NOT_FOUND, StatusCode.UNIMPLEMENTED):
                self._agent_has_metrics = False  # an older agent: it will not have it later either
            log.warning("the guest's part of the metrics of %s is missing: %s", self._managed.sandbox_id, exc)
            return ""
        text, cut = await asyncio.to_thread(guest_metrics, str(answer.metrics))
        if cut and not self._warned:
            log.warning("the guest of %s says too much in its metrics: the rest is left out", self._managed.sandbox_id)
            self._warned = True
        return text

    async def close(self) -> None:
        """Idempotent."""
        await self._background.close()
