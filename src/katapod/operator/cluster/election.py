"""Of several operators one acts: the holder of a Lease, until it has not been able to renew it for RENEW_LIMIT_S.

No clock is compared with another machine's. Who waits takes a lease over once it has seen it unchanged for as long as
the lease says; a holder counts from before its last renewal was asked for. So the one has stopped before the other
begins, as long as their clocks run at about the same speed. Source: client-go, tools/leaderelection.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Protocol

import msgspec

from katapod.operator.cluster.errors import ClusterFailed
from katapod.operator.names import MANAGED_BY, MANAGER

__all__ = ["LEASE", "LEASE_S", "RENEW_LIMIT_S", "Elector", "LeaseView", "claim", "parse_lease", "release"]

log = logging.getLogger(__name__)

LEASE = "katapod-operator"
LEASE_S = 15  # that a lease is left alone for when nothing is heard of its holder
RENEW_LIMIT_S = 10.0  # that a holder goes on for without a renewal
RENEW_S = 3.0
WATCH_S = 2.0  # between two looks of those that wait; up to half of it more, so that they do not come at once
Body = dict[str, Any]


class LeaseView(msgspec.Struct, frozen=True):
    """Source: Kubernetes API, coordination.k8s.io/v1 Lease."""

    holder: str  # empty: it was released
    version: str  # its resourceVersion: another one after each renewal
    duration_s: int
    acquired: str
    transitions: int


class LeaseStore(Protocol):
    async def read_lease(self, name: str) -> LeaseView | None: ...
    async def write_lease(self, body: Body) -> LeaseView | None:
        """None if somebody else was faster. Both raise ClusterFailed."""
        ...


def parse_lease(body: Mapping[str, Any]) -> LeaseView:
    spec = body.get("spec") or {}
    return LeaseView(
        holder=spec.get("holderIdentity") or "",
        version=body["metadata"].get("resourceVersion", ""),
        duration_s=int(spec.get("leaseDurationSeconds") or LEASE_S),
        acquired=spec.get("acquireTime") or "",
        transitions=int(spec.get("leaseTransitions") or 0),
    )


def claim(seen: LeaseView | None, identity: str, idle_s: float, now: datetime) -> Body | None:
    """What to write to hold the lease, or to go on holding it; None while it is another's.

    `idle_s`: for how long it has been seen as it is.
    """
    time_now = _time(now)
    if seen is None:
        return _lease(identity, "", LEASE_S, time_now, time_now, 0)
    if seen.holder == identity:
        return _lease(identity, seen.version, LEASE_S, seen.acquired or time_now, time_now, seen.transitions)
    if seen.holder and idle_s < seen.duration_s:
        return None
    return _lease(identity, seen.version, LEASE_S, time_now, time_now, seen.transitions + 1)


def release(held: LeaseView, now: datetime) -> Body:
    return _lease("", held.version, 1, held.acquired or _time(now), _time(now), held.transitions)


def _lease(holder: str, version: str, duration_s: int, acquired: str, renewed: str, transitions: int) -> Body:
    metadata = {"name": LEASE, "labels": {MANAGED_BY: MANAGER}}
    return {
        "metadata": metadata | ({"resourceVersion": version} if version else {}),
        "spec": {
            "holderIdentity": holder,
            "leaseDurationSeconds": duration_s,
            "acquireTime": acquired,
            "renewTime": renewed,
            "leaseTransitions": transitions,
        },
    }


def _time(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%S.%fZ")  # MicroTime


class Elector:
    """`gained` is called whenever this operator has become the one that acts."""

    def __init__(
        self,
        store: LeaseStore,
        identity: str,
        gained: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.identity = identity
        self._store = store
        self._gained = gained
        self._clock = clock
        self._until = 0.0  # by the clock: how long we may act
        self._held: LeaseView | None = None  # as our last renewal has left it
        self._seen: LeaseView | None = None
        self._seen_since = 0.0

    def left_s(self) -> float:
        """For how long this operator may act: 0 if it may not. What is asked of the API server has to end by then."""
        return max(0.0, self._until - self._clock())

    async def run(self) -> None:
        while True:
            await self.step()
            wait_s = RENEW_S if self.left_s() else WATCH_S * random.uniform(1, 1.5)  # noqa: S311
            await asyncio.sleep(wait_s)

    async def step(self) -> None:
        """Renew the lease, or take it if it is free."""
        began, led = self._clock(), self.left_s() > 0
        try:
            async with asyncio.timeout(RENEW_LIMIT_S / 2):
                self._held = await self._renew(began)
        except (ClusterFailed, TimeoutError) as exc:
            log.warning("cannot renew the lease %s: %s", LEASE, exc or "no answer")
            return  # we go on for as long as the last renewal allows
        if self._held is None:
            self._until = 0.0
            if led:
                log.warning("the lease %s is another's now: this operator stands by", LEASE)
            return
        self._until = began + RENEW_LIMIT_S
        if not led:
            log.info("%s holds the lease %s, and acts", self.identity, LEASE)
            self._gained()

    async def _renew(self, now: float) -> LeaseView | None:
        """The lease as we hold it; None if it is another's. Raises ClusterFailed."""
        if self._held is not None:
            body = claim(self._held, self.identity, 0, datetime.now(UTC))
            held, self._held = self._held, None
            if body is not None and (written := await self._write(body, held)) is not None:
                return written
        seen = await self._store.read_lease(LEASE)
        if seen != self._seen or seen is None:
            self._seen, self._seen_since = seen, now
        body = claim(seen, self.identity, now - self._seen_since, datetime.now(UTC))
        return None if body is None else await self._store.write_lease(body)

    async def _write(self, body: Body, held: LeaseView) -> LeaseView | None:
        try:
            return await self._store.write_lease(body)
        except (ClusterFailed, asyncio.CancelledError):
            self._held = held  # it may be ours still: the next renewal finds out
            raise

    async def release(self) -> None:
        """Let another one act at once. What fails is made good by waiting."""
        self._until = 0.0
        if self._held is None:
            return
        try:
            async with asyncio.timeout(RENEW_LIMIT_S / 2):
                await self._store.write_lease(release(self._held, datetime.now(UTC)))
        except (ClusterFailed, TimeoutError) as exc:
            log.warning("cannot release the lease %s: %s", LEASE, exc or "no answer")
        self._held = None
