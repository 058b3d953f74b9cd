"""`exec -d`: a child that goes on when we have ended holds the process in the container."""

import asyncio
import contextlib
import json
import os

from katapod.host.state import StateStore
from katapod.model.errors import KatapodError
from katapod.sandbox.errors import CommandNotExecutable, CommandNotFound
from katapod.sandbox.execs import ExecRequest
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
    if not report:
        os.waitpid(pid, 0)
        raise KatapodError(f"cannot exec in container {name}: the process in the background was killed")
    answer = json.loads(report)
    if "error" in answer:
        os.waitpid(pid, 0)
        kind = {127: CommandNotFound, 126: CommandNotExecutable}.get(answer["code"], KatapodError)
        raise kind(answer["error"], hint=answer["hint"])
    return 0


def _hold(store: StateStore, name: str, sandbox_id: str, container_id: str, request: ExecRequest, writer: int) -> int:
    """The child: a session of its own, with no streams of the caller's."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)

    def tell(message: dict[str, object]) -> None:
        with contextlib.suppress(OSError):
            os.write(writer, json.dumps(message).encode())

    async def go() -> int:
        async with started_exec(store, name, sandbox_id, container_id, request) as running:
            tell({})
            os.close(writer)
            return await carry_to(running, (0, 1, 2), interactive=False)

    try:
        return asyncio.run(go())
    except KatapodError as exc:
        tell({"error": str(exc), "hint": exc.hint, "code": exc.exit_code})
    except BaseException as exc:
        tell({"error": str(exc) or repr(exc), "hint": "", "code": 125})
    return 125
