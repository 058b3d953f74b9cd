"""What a container is reached by: this process holds it, or its supervisor's control socket does."""

import asyncio
import contextlib
import signal
from collections.abc import Coroutine
from typing import Any, Protocol, TypeVar

from katapod.model.errors import InvalidState, KatapodError, NotFound
from katapod.model.record import SandboxRecord, State
from katapod.rpc.status import RpcError
from katapod.sandbox.client import ControlClient, why_cut_off
from katapod.sandbox.container import Container
from katapod.sandbox.endings import until_supervisor_ended
from katapod.sandbox.execs import ExecRequest, exec_in, spec_on_disk
from katapod.sandbox.runner import SIGPIPE_STATUS, Streams, carry_container, start_container
from katapod.sandbox.stdio import GuestProcess, Sink, Source, carry

__all__ = ["Attached", "Held", "Link"]

_Result = TypeVar("_Result")


class Link(Protocol):
    """Everything raises KatapodError."""

    @property
    def container_id(self) -> str: ...
    def record(self) -> SandboxRecord: ...
    async def guard(self, work: Coroutine[Any, Any, _Result]) -> _Result: ...
    async def exec(self, request: ExecRequest) -> GuestProcess: ...
    async def carry(self, guest: GuestProcess, stdin: Source | None, stdout: Sink, stderr: Sink) -> int: ...
    async def kill(self, number: int) -> None: ...
    async def pause(self) -> None: ...
    async def resume(self) -> None: ...


class Held:
    """By this process, its supervisor."""

    def __init__(self, container: Container) -> None:
        self.container = container
        self._sandbox = container.sandbox

    @property
    def container_id(self) -> str:
        return self.container.container_id

    def record(self) -> SandboxRecord:
        return self._sandbox.record

    async def guard(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        return await self._sandbox.guard(work)

    async def start(self, stdin: Source | None, stdout: Sink, stderr: Sink) -> Coroutine[Any, Any, int]:
        """Returns what carries its streams to its end."""
        await start_container(self.container)
        return carry_container(self.container, Streams(stdin, stdout, stderr), lambda container: None)

    async def exec(self, request: ExecRequest) -> GuestProcess:
        sandbox, spec = self._sandbox, self.container.plan.spec
        if sandbox.death.done():
            raise sandbox.death.result()
        state = self.container.record.state
        if state is not State.RUNNING:
            raise InvalidState(f"cannot exec in container {self.container_id}: it is {state.value}")
        return await sandbox.guard(exec_in(sandbox.agent, sandbox.record, self.container_id, spec, request))

    async def carry(self, guest: GuestProcess, stdin: Source | None, stdout: Sink, stderr: Sink) -> int:
        return await self._sandbox.guard(_carry(guest, stdin, stdout, stderr))

    async def kill(self, number: int) -> None:
        await self.container.kill(number, everyone=number == signal.SIGKILL)

    async def pause(self) -> None:
        await self.container.pause()

    async def resume(self) -> None:
        await self.container.resume()


class Attached:
    """By another process."""

    def __init__(self, client: ControlClient, container_id: str) -> None:
        self._client = client
        self._container_id = container_id

    @property
    def container_id(self) -> str:
        return self._container_id

    def record(self) -> SandboxRecord:
        """Raises NotFound."""
        record = self._client.record_now()
        if record is None:
            raise NotFound(f"cannot find container {self._container_id}: it was removed when it ended")
        return record

    async def guard(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        try:
            return await work
        except RpcError as exc:
            cause = await why_cut_off(self._client, exc, "the container has ended")
            raise KatapodError(f"cannot reach a process of container {self._container_id}: {cause}") from exc

    async def exec(self, request: ExecRequest) -> GuestProcess:
        spec = spec_on_disk(self._client.paths, self._container_id)
        if spec is None:
            raise NotFound(f"cannot exec in container {self._container_id}: it has ended")
        return await exec_in(self._client.agent, self._client.record, self._container_id, spec, request)

    async def carry(self, guest: GuestProcess, stdin: Source | None, stdout: Sink, stderr: Sink) -> int:
        return await self.guard(_carry(guest, stdin, stdout, stderr))

    async def wait(self) -> int:
        """Its supervisor ends the connection when the container has ended, and says so in the record."""
        if len(self.record().containers) > 1 or self.record().pod:
            raise InvalidState(f"cannot wait for container {self._container_id}: its sandbox may outlive it")
        await asyncio.shield(self._client.connection.closed)
        found = next((item for item in self.record().containers if item.container_id == self._container_id), None)
        if found is None or found.exit_code is None:
            raise KatapodError(f"cannot tell how container {self._container_id} ended: its supervisor was killed")
        # it still removes what the sandbox had, which cannot be deleted
        await until_supervisor_ended(self._client.paths)
        return found.exit_code

    async def kill(self, number: int) -> None:
        await self._client.kill(self._container_id, number)

    async def pause(self) -> None:
        await self._client.pause(self._container_id)

    async def resume(self) -> None:
        await self._client.resume(self._container_id)


async def _carry(guest: GuestProcess, stdin: Source | None, stdout: Sink, stderr: Sink) -> int:
    """As any local process would, one whose output nobody reads ends by SIGPIPE."""
    try:
        return await carry(guest, stdin, stdout, stderr)
    except BrokenPipeError:
        with contextlib.suppress(RpcError):
            await guest.signal(signal.SIGKILL)
        return SIGPIPE_STATUS
