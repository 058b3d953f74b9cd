"""Whether a sandbox's guest still works: what is slow is not dead.

Any answer of the agent is a sign of life. Without one, a guest whose virtual CPUs run, or wait for a CPU of the host,
is busy, and is left alone; one that has been idle as long as it owes an answer hangs.
"""

import asyncio
import logging
import os
import time
from typing import TYPE_CHECKING

from katapod.model.errors import KatapodError
from katapod.rpc.status import RpcError, StatusCode
from katapod.sandbox.errors import AgentFailed
from katapod.sandbox.guard import CAUSE_LIMIT_S

if TYPE_CHECKING:
    from katapod.sandbox.lifecycle import Sandbox

__all__ = ["busy_s", "declare_dead", "watch_health"]

log = logging.getLogger(__name__)

HEALTH_PERIOD_S = 5.0
HEALTH_LIMIT_S = 30.0
BUSY_SHARE = 0.25
"""Of the time without an answer that a guest that works has at least run, or waited for a CPU. An idle one takes a few
hundredths."""


async def watch_health(sandbox: "Sandbox") -> None:
    """Declare the sandbox dead when its agent owes an answer while the guest does nothing, or breaks off while the VMM
    lives."""
    gone = sandbox.agent.connection.closed
    while not sandbox.death.done():
        await asyncio.wait({gone}, timeout=HEALTH_PERIOD_S)
        if gone.done():  # on a vsock that is how the agent's own death looks; QEMU's is known a moment later
            await asyncio.wait({sandbox.death}, timeout=CAUSE_LIMIT_S)
            declare_dead(sandbox, AgentFailed(f"the agent of sandbox {sandbox.sandbox_id} has gone: {gone.result()}"))
            return
        asked_at, busy = time.monotonic(), busy_s(sandbox.vm.pid)
        try:
            await sandbox.agent.check(timeout_s=HEALTH_LIMIT_S)
        except RpcError as exc:
            if exc.code is StatusCode.DEADLINE_EXCEEDED:
                await _judge_silence(sandbox, asked_at, busy_s(sandbox.vm.pid) - busy)
            else:
                log.debug("the agent of %s is alive, but says: %s", sandbox.sandbox_id, exc)


async def _judge_silence(sandbox: "Sandbox", asked_at: float, busy: float) -> None:
    sandbox_id = sandbox.sandbox_id
    if sandbox.agent.connection.heard_at > asked_at:
        log.debug("the agent of %s is slow: it answers other calls", sandbox_id)
    elif busy > BUSY_SHARE * (time.monotonic() - asked_at):
        log.warning("the agent of %s has not answered for %g s, and its guest is busy", sandbox_id, HEALTH_LIMIT_S)
    elif await sandbox.console.answers():
        log.warning("the agent of %s hangs; it is left alone while its debug console is in use", sandbox_id)
    else:
        limit = f"its agent did not answer for {HEALTH_LIMIT_S:g} s"
        declare_dead(sandbox, AgentFailed(f"sandbox {sandbox_id} hangs: {limit}, and its guest does nothing"))


def busy_s(pid: int) -> float:
    """Seconds that the threads of a VMM have run or waited for a CPU; 0 for one that has ended.

    Source: schedstat of proc(5) and Documentation/scheduler/sched-stats.rst: nanoseconds of both.
    """
    total = 0
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/schedstat") as handle:
                run, waited, _ = handle.read().split()
                total += int(run) + int(waited)
    except (OSError, ValueError):
        pass  # it ends meanwhile
    return total / 1e9


def declare_dead(sandbox: "Sandbox", cause: KatapodError) -> None:
    """The first cause is the one that is told; a VMM that is being stopped has none."""
    if not sandbox.death.done() and not sandbox.vm.stopping:
        sandbox.death.set_result(cause)
