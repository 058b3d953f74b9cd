"""Names that a guest asks a name server on the loopback of its network namespace on the host, carried there and back.

The guest's programs find its address in their resolv.conf, and the guest's own loopback there. The agent takes what is
for it; we ask in the namespace. Nothing else of the host can be reached so: the address is the host's choice.
"""

import asyncio
import logging
from collections.abc import Iterable
from ipaddress import IPv4Address
from pathlib import Path

from katapod.host.names import ask, serves_names
from katapod.rpc.agent import AgentClient
from katapod.rpc.status import RpcError, StatusCode
from katapod.tasks import Background

__all__ = ["LoopbackNames", "failure", "loopback_servers"]

log = logging.getLogger(__name__)

AT_A_TIME_MAX = 32
ANSWER_LIMIT_S = 20.0  # dockerd asks several servers in turn, each for some seconds
HEADER_BYTES = 12  # RFC 1035, 4.1.1
_RESPONSE, _SERVER_FAILURE = 0x80, 2


def loopback_servers(lines: Iterable[str]) -> tuple[str, ...]:
    """The IPv4 loopback addresses among the name servers of a resolv.conf."""
    found = []
    for line in lines:
        words = line.split()
        if len(words) < 2 or words[0] != "nameserver":
            continue
        try:
            if IPv4Address(words[1]).is_loopback:
                found.append(words[1])
        except ValueError:
            continue
    return tuple(dict.fromkeys(found))


def failure(query: bytes) -> bytes:
    """The answer SERVFAIL to a query, so that who asked need not wait; empty if it is none."""
    if len(query) < HEADER_BYTES:
        return b""
    return bytes([*query[:2], query[2] | _RESPONSE, query[3] & 0xF0 | _SERVER_FAILURE, *query[4:]])


class LoopbackNames:
    """Of one sandbox. It is closed with it."""

    def __init__(self, agent: AgentClient, sandbox_id: str) -> None:
        self._agent = agent
        self._sandbox_id = sandbox_id
        self._background = Background()
        self._served = ""
        self._free = asyncio.Semaphore(AT_A_TIME_MAX)

    async def serve(self, netns: Path, resolv_conf: Iterable[str]) -> None:
        """Do so from now on, if a server of this resolv.conf is on the loopback of `netns`. Where that cannot be
        done the log says so: the container has a network all the same."""
        if self._served:
            return
        for address in loopback_servers(resolv_conf):
            try:
                if not await asyncio.to_thread(serves_names, netns, address):
                    continue
                await self._agent.take_names(IPv4Address(address).packed)
            except (OSError, RpcError) as exc:
                log.warning("containers of %s cannot ask the name server %s: %s", self._sandbox_id, address, exc)
                return
            self._served = address
            self._background.start(self._take(netns), name="take-queries")
            return

    async def close(self) -> None:
        await self._background.close()

    async def _take(self, netns: Path) -> None:
        try:
            while True:
                await self._free.acquire()
                query_id, message, stream = await self._agent.next_query()
                work = self._carry(netns, query_id, message, stream=stream)
                self._background.start(work, name=f"query-{query_id}")
        except RpcError as exc:
            if exc.code is not StatusCode.UNAVAILABLE:
                log.debug("no more queries of %s: %s", self._sandbox_id, exc.message)

    async def _carry(self, netns: Path, query_id: int, message: bytes, *, stream: bool) -> None:
        try:
            try:
                async with asyncio.timeout(ANSWER_LIMIT_S):
                    answer = await ask(netns, self._served, message, stream=stream)
            except (OSError, EOFError) as exc:  # a time limit is one, too
                log.debug("no answer of %s to a query of %s: %s", self._served, self._sandbox_id, exc)
                answer = failure(message)
            await self._agent.answer_query(query_id, answer)
        except RpcError as exc:  # the guest is about to end
            log.debug("query %d of %s: %s", query_id, self._sandbox_id, exc.message)
        finally:
            self._free.release()
