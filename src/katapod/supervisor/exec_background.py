"""`exec -d`: a child that goes on when we have ended holds the process in the container."""

import asyncio
import os

from katapod.host.state import StateStore
from katapod.sandbox.execs import ExecRequest
from katapod.supervisor.background_report import expect_started, tell, tell_error
from katapod.supervisor.exec_run import started_exec
from katapod.supervisor.foreground import carry_to

__all__ = ["exec_in_background"]


def exec_in_background(store: StateStore, name: str, sandbox_id: str, container_id: str, request: ExecRequest) -> int:
    """Return 0 once the process runs; what it writes is read and thrown away. Raises as started_exec."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        os._exit(_hold(store, name, sandbox_id, container_id, request, writer))
    os.close(writer)
    with os.fdopen(reader, "rb") as handle:
        report = handle.read()
    expect_started(report, pid, f"exec in container {name}")
    return 0


def _hold(store: StateStore, name: str, sandbox_id: str, container_id: str, request: ExecRequest, writer: int) -> int:
    """The child: a session of its own, with no streams of the caller's."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)

    async def go() -> int:
        async with started_exec(store, name, sandbox_id, container_id, request) as running:
            tell(writer, {})
            os.close(writer)
            return await carry_to(running, (0, 1, 2), interactive=False)

    try:
        return asyncio.run(go())
    except BaseException as exc:
        tell_error(writer, exc)
    return 125
