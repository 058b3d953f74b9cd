"""A running container followed to its exit, for every entry point: its streams, what it ran out of, its
status on record."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping

from katapod.host.allowance import Allowance
from katapod.model.errors import KatapodError
from katapod.model.exit_status import KILLED_STATUS
from katapod.rpc.pb import agent_pb2
from katapod.rpc.status import RpcError
from katapod.sandbox.container import Container
from katapod.sandbox.lifecycle import Sandbox
from katapod.sandbox.stdio import Sink, Source

__all__ = ["follow", "watch_oom"]

log = logging.getLogger(__name__)

OOM_WORD_S = 0.5
OOM_BURST, OOM_PER_S = 32, 1.0  # events of a guest, which it may make up: it keeps those of some time


async def follow(container: Container, stdin: Source | None, stdout: Sink, stderr: Sink) -> int:
    """Carry the streams of a container that runs to its end, record that, and return its exit status.

    Whether it was killed for its memory is known then (`out_of_memory`), and on record. Raises BrokenPipeError if
    nobody reads its output; KatapodError, why its sandbox died.
    """
    status = await container.carry(stdin, stdout, stderr)
    alone = container.container_id == container.sandbox.sandbox_id
    if status == KILLED_STATUS and alone and not container.killed:
        # the event travels beside the exit status, and the VM ends next: give it a moment
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(OOM_WORD_S):
                await container.out_of_memory.wait()
    if container.out_of_memory.is_set():
        try:
            container.save(oom_killed=True)
        except KatapodError as exc:  # who waits for the status is to have it all the same
            log.error("what ended %s is not on record: %s", container.container_id, exc)
    return status


async def watch_oom(
    sandbox: Sandbox, containers: Mapping[str, Container], tell: Callable[[Container], None] = lambda container: None
) -> None:
    """Mark each of the containers whose memory limit made the guest kill a process, and `tell` of it each time. Ends
    with the sandbox."""
    allowance = Allowance(OOM_BURST, OOM_PER_S)
    while True:
        await asyncio.sleep(allowance.take())
        try:
            request = agent_pb2.GetOOMEventRequest()
            event = await sandbox.guard(sandbox.agent.call("GetOOMEvent", request, timeout_s=None))
        except (KatapodError, RpcError) as exc:
            log.debug("no more OOM events: %s", exc)
            return
        container = containers.get(event.container_id)
        if container is not None:
            container.out_of_memory.set()
            tell(container)
