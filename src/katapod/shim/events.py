"""Events to containerd, in the order in which they happened, with a bounded number of attempts.

Source: api/events/task.proto of containerd. Without an address (CRI-O) they are only logged.
"""

import asyncio
import contextlib
import itertools
import logging
import time
from collections import deque
from typing import Any

from katapod.rpc.client import TtrpcClient
from katapod.rpc.status import RpcError, StatusCode
from katapod.shim.pb import events_pb2
from katapod.tasks import Background

__all__ = ["EventPublisher"]

log = logging.getLogger(__name__)

SERVICE = "containerd.services.events.ttrpc.v1.Events"
CALL_LIMIT_S = 5.0
NO_ANSWER = (StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED)
TRIES = 6
QUEUE_MAX = 2048  # events; beyond that the oldest that is not an exit is dropped
EXIT, OOM = "/tasks/exit", "/tasks/oom"
PAUSE_MAX_S = 8.0


class EventPublisher:
    """One queue and one sender: events are never out of order.

    Engines wait for exits: these are never dropped, and are retried until containerd has answered. Their number is
    bounded by the processes that an engine has started.
    """

    def __init__(self, address: str, namespace: str) -> None:
        """`address`: path of containerd's ttrpc socket, or empty."""
        self._address = address.removeprefix("unix://")
        self._namespace = namespace
        self._queue: deque[events_pb2.ForwardRequest] = deque()
        self._more = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._client: TtrpcClient | None = None
        self._background = Background()
        self._background.start(self._send_all(), name="events")

    @property
    def connected(self) -> bool:
        """Whether the engine receives events; CRI-O does not."""
        return bool(self._address)

    def publish(self, topic: str, event: Any) -> None:
        """`topic` such as /tasks/exit; `event` a message of events.proto."""
        log.info("event %s %s", topic, str(event).replace("\n", " "))
        if not self._address:
            return
        request = events_pb2.ForwardRequest()
        now = time.time_ns()
        request.envelope.timestamp.seconds, request.envelope.timestamp.nanos = divmod(now, 10**9)
        request.envelope.namespace = self._namespace
        request.envelope.topic = topic
        request.envelope.event.type_url = event.DESCRIPTOR.full_name
        request.envelope.event.value = event.SerializeToString()
        if topic == OOM and any(_same(waiting, request) for waiting in self._queue):
            return
        if len(self._queue) >= QUEUE_MAX:
            self._make_room()
        self._queue.append(request)
        self._empty.clear()
        self._more.set()

    def _make_room(self) -> None:
        index = next((at for at, waiting in enumerate(self._queue) if waiting.envelope.topic != EXIT), None)
        if index is not None:
            log.warning(
                "event dropped: %s; %d are waiting for containerd", self._queue[index].envelope.topic, QUEUE_MAX
            )
            del self._queue[index]

    async def drain(self, limit_s: float) -> None:
        """Wait until all events are sent or given up."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self._empty.wait()

    async def close(self) -> None:
        await self._background.close()
        if self._client is not None:
            self._client.close()

    async def _send_all(self) -> None:
        while True:
            while self._queue:
                await self._send(self._queue.popleft())
            self._empty.set()
            self._more.clear()
            await self._more.wait()

    async def _send(self, request: events_pb2.ForwardRequest) -> None:
        payload = request.SerializeToString()
        for attempt in itertools.count():
            if attempt > 1:  # the first retry is immediate: containerd may have closed an idle connection
                await asyncio.sleep(min(PAUSE_MAX_S, 2.0 ** (attempt - 2)))
            try:
                if self._client is None or self._client.closed.done():
                    self._client = await TtrpcClient.on_unix_path(self._address, "containerd")
                await self._client.call_raw(SERVICE, "Forward", payload, CALL_LIMIT_S)
                return
            except (OSError, RpcError) as exc:
                log.debug("cannot publish %s: %s", request.envelope.topic, exc)
                is_refused = isinstance(exc, RpcError) and exc.code not in NO_ANSWER
                if attempt + 1 >= TRIES and (is_refused or request.envelope.topic != EXIT):
                    log.warning("event %s dropped: %s", request.envelope.topic, exc)
                    return


def _same(one: events_pb2.ForwardRequest, other: events_pb2.ForwardRequest) -> bool:
    return one.envelope.topic == other.envelope.topic and one.envelope.event.value == other.envelope.event.value
