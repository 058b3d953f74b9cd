"""Whether a sandbox's guest still works: what is slow is not dead.

Any answer of the agent is a sign of life. Without one, a guest all of whose virtual CPUs run, or wait for a CPU of the
host, is busy, and is left alone. One with time to spare hangs: its agent comes before all else in it.
"""

import asyncio
import logging
import time
from typing import Protocol

from katapod.model.errors import KatapodError
from katapod.rpc.agent import AgentClient
from katapod.rpc.status import RpcError, StatusCode
from katapod.sandbox.console import ConsoleLink
from katapod.sandbox.errors import AgentFailed
from katapod.sandbox.guard import CAUSE_LIMIT_S
from katapod.vmm.protocol import VirtualMachine

__all__ = ["declare_dead", "watch_health"]

log = logging.getLogger(__name__)

HEALTH_PERIOD_S = 5.0
HEALTH_LIMIT_S = 30.0
BUSY_SHARE = 0.9  # of the time without an answer, in which no virtual CPU had time for an agent


class Mortal(Protocol):
    """Part of lifecycle.Sandbox."""

    @property
    def sandbox_id(self) -> str: ...
    @property
    def agent(self) -> AgentClient: ...
    @property
    def vm(self) -> VirtualMachine: ...
    @property
    def console(self) -> ConsoleLink: ...
    @property
    def death(self) -> "asyncio.Future[KatapodError]": ...


async def watch_health(sandbox: Mortal) -> None:
    """Declare the sandbox dead when its agent owes an answer while the guest has time for one, or when the agent breaks
    off while the VMM lives."""
    gone = sandbox.agent.connection.closed
    while not sandbox.death.done():
        await asyncio.wait({gone}, timeout=HEALTH_PERIOD_S)
        if gone.done():  # on a vsock that is how the agent's own death looks; the VMM's is known a moment later
            await asyncio.wait({sandbox.death}, timeout=CAUSE_LIMIT_S)
            declare_dead(sandbox, AgentFailed(f"the agent of sandbox {sandbox.sandbox_id} has gone: {gone.result()}"))
            return
        asked_at, busy = time.monotonic(), sandbox.vm.busy_s()
        try:
            await sandbox.agent.check(timeout_s=HEALTH_LIMIT_S)
        except RpcError as exc:
            if exc.code is StatusCode.DEADLINE_EXCEEDED:
                await _judge_silence(sandbox, asked_at, sandbox.vm.busy_s() - busy)
            else:
                log.debug("the agent of %s is alive, but says: %s", sandbox.sandbox_id, exc)


async def _judge_silence(sandbox: Mortal, asked_at: float, busy: float) -> None:
    sandbox_id = sandbox.sandbox_id
    if sandbox.agent.connection.heard_at > asked_at:
        log.debug("the agent of %s is slow: it answers other calls", sandbox_id)
    elif busy > BUSY_SHARE * (time.monotonic() - asked_at):
        log.warning("the agent of %s has not answered for %g s, and its guest is busy", sandbox_id, HEALTH_LIMIT_S)
    elif await sandbox.console.answers():
        log.warning("the agent of %s hangs; it is left alone while its debug console is in use", sandbox_id)
    else:
        limit = f"its agent did not answer for {HEALTH_LIMIT_S:g} s"
        declare_dead(sandbox, AgentFailed(f"sandbox {sandbox_id} hangs: {limit}, and its guest had time to"))


def declare_dead(sandbox: Mortal, cause: KatapodError) -> None:
    """The first cause is the one that is told; a VMM that is being stopped has none."""
    if not sandbox.death.done() and not sandbox.vm.stopping:
        sandbox.death.set_result(cause)
