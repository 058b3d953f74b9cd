"""Another process's view of a live sandbox: the client of its supervisor's control socket, and execs through it.

Kept apart from control.py, and light, since every `exec` waits for these imports.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

import msgspec

from katapod.host.locks import is_stopped
from katapod.host.state import StateStore, supervisor_alive
from katapod.model import oci
from katapod.model.errors import InvalidState, KatapodError, NotFound, SpecError
from katapod.model.record import SandboxRecord, State
from katapod.model.tokens import random_hex
from katapod.rpc.agent import AgentClient
from katapod.rpc.client import TtrpcClient
from katapod.rpc.console import VM_ID
from katapod.rpc.features import PREFIX
from katapod.rpc.oci_message import features_needed
from katapod.rpc.pb import agent_pb2, oci_pb2
from katapod.rpc.status import RpcError, StatusCode
from katapod.sandbox.errors import AgentFailed, ConsoleIsRaw, ConsoleOff, command_error
from katapod.sandbox.stdio import GuestProcess
from katapod.tasks import beside

__all__ = [
    "CONTROL_SERVICE",
    "KILLED",
    "ContainerRequest",
    "ControlClient",
    "HoldRequest",
    "KillRequest",
    "UpdateRequest",
    "WaitAnswer",
    "connect_control",
    "require_features",
    "start_exec",
    "start_in_vm",
    "string_user",
    "why_cut_off",
]

KILLED = "the kata-runtime that runs the container was killed"

log = logging.getLogger(__name__)

CONTROL_SERVICE = "katapod.Control"
CONSOLE_LIMIT_S = 20.0


class KillRequest(msgspec.Struct, forbid_unknown_fields=True):
    container_id: str
    signal: int


class ContainerRequest(msgspec.Struct, forbid_unknown_fields=True):
    container_id: str


class UpdateRequest(msgspec.Struct, forbid_unknown_fields=True):
    container_id: str
    resources: oci.Resources


class WaitAnswer(msgspec.Struct, forbid_unknown_fields=True):
    exit_code: int


class HoldRequest(msgspec.Struct, forbid_unknown_fields=True):
    exec_id: str


class ControlClient:
    """Another command's view of a live sandbox."""

    def __init__(self, connection: TtrpcClient, store: StateStore, record: SandboxRecord) -> None:
        self.connection = connection
        self.record = record
        self.paths = store.layout.sandbox(record.sandbox_id)
        self._store = store
        self.agent = AgentClient(connection)

    def record_now(self) -> SandboxRecord | None:
        """What the disk says by now; None if the sandbox has been removed."""
        with contextlib.suppress(KatapodError):
            return self._store.read(self.record.sandbox_id)
        return None

    async def _call(self, method: str, request: msgspec.Struct | None = None, timeout_s: float | None = 60.0) -> bytes:
        payload = msgspec.json.encode(request) if request is not None else b""
        try:
            return await self.connection.call_raw(CONTROL_SERVICE, method, payload, timeout_s)
        except RpcError as exc:
            if self.connection.closed.done():
                what = f"cannot {method.lower()} container {self.record.sandbox_id}: it ended meanwhile"
                raise InvalidState(what) from exc
            kind = {StatusCode.NOT_FOUND: NotFound, StatusCode.FAILED_PRECONDITION: InvalidState}.get(exc.code)
            raise (kind or KatapodError)(exc.message) from exc

    async def kill(self, container_id: str, signal_number: int) -> None:
        await self._call("Kill", KillRequest(container_id, signal_number))

    async def pause(self, container_id: str) -> None:
        await self._call("Pause", ContainerRequest(container_id))

    async def resume(self, container_id: str) -> None:
        await self._call("Resume", ContainerRequest(container_id))

    async def update(self, container_id: str, resources: oci.Resources) -> None:
        await self._call("Update", UpdateRequest(container_id, resources))

    async def wait(self, container_id: str) -> int:
        """Its exit status, once it has ended. Raises KatapodError if its supervisor was killed."""
        answer = await self._call("Wait", ContainerRequest(container_id), timeout_s=None)
        return msgspec.json.decode(answer, type=WaitAnswer).exit_code

    async def shut_down(self) -> None:
        await self._call("ShutDown")

    async def hold(self, exec_id: str) -> None:
        """Have a process of the debug console hung up when this connection ends. Never returns while the VM lives."""
        with contextlib.suppress(RpcError):
            await self.connection.call_raw(CONTROL_SERVICE, "Hold", msgspec.json.encode(HoldRequest(exec_id)), None)


@contextlib.asynccontextmanager
async def connect_control(store: StateStore, sandbox_id: str) -> AsyncIterator[ControlClient]:
    """Connect to the supervisor of a sandbox. Raises NotFound if there is none, InvalidState if it is stopped.

    One that a signal has stopped is told of: it answers once it goes on, and who has stopped it may be about to.
    """
    record = store.read(sandbox_id)
    path = store.layout.sandbox(sandbox_id).control_socket
    try:
        connection = await TtrpcClient.on_unix_path(str(path), f"supervisor of {sandbox_id}")
    except OSError as exc:
        state = record.state if record.state in (State.CREATING, State.CREATED) else State.STOPPED
        raise InvalidState(
            f"cannot reach container {sandbox_id}: it is {state.value}", hint="see: kata-runtime list"
        ) from exc
    try:
        if is_stopped(record.supervisor_pid):  # it lives: it listens
            log.warning(
                "the supervisor of %s, process %d, is stopped by a signal, and answers once it goes on: kill -CONT %d",
                sandbox_id,
                record.supervisor_pid,
                record.supervisor_pid,
            )
        yield ControlClient(connection, store, record)
    finally:
        connection.close()


async def why_cut_off(client: ControlClient, error: RpcError | NotFound, ended: str) -> str:
    """The cause of a broken connection to the supervisor; `ended` says the usual one."""
    if not client.connection.closed.done():
        return str(error)
    # The supervisor ends the connection when its container has ended, and says so in the record, or it was killed.
    for _ in range(50):
        record = client.record_now()
        if record is None or all(item.state is State.STOPPED for item in record.containers):
            break
        if not supervisor_alive(client.paths):
            return KILLED
        await asyncio.sleep(0.02)
    return ended


def string_user(text: str, groups: tuple[str, ...] = ()) -> agent_pb2.StringUser | None:
    if not text:
        return None
    user, _, group = text.partition(":")
    return agent_pb2.StringUser(uid=user, gid=group, additionalGids=groups)


async def require_features(agent: AgentClient, needed: frozenset[str]) -> None:
    """Raises SpecError if the agent lacks one of them, RpcError."""
    if not needed:
        return  # nothing to ask for
    lacking = sorted(name.removeprefix(PREFIX) for name in needed - await agent.features())
    if lacking:
        raise SpecError(
            f"cannot set {' and '.join(lacking)}: the agent in the guest image does not know it",
            hint="use a guest image with Katapod's agent of this version: kata-runtime image build",
        )


async def start_exec(
    agent: AgentClient,
    container_id: str,
    process: oci_pb2.Process,
    *,
    user: str,
    groups: tuple[str, ...] = (),
    timeout_s: float | None = 60.0,
) -> GuestProcess:
    """Start one more process in a running container, in its turn; `timeout_s` runs from then. Errors as in
    create_container.

    `agent` may be the sandbox's own channel or a connection to its supervisor's control socket. Without a `user`, who
    may be in further `groups`, the process says by numbers who runs it.
    """
    exec_id = random_hex(16)
    request = agent_pb2.ExecProcessRequest(
        container_id=container_id, exec_id=exec_id, process=process, string_user=string_user(user, groups)
    )
    try:
        await require_features(agent, features_needed(process))
        async with agent.launches:
            await agent.call("ExecProcess", request, timeout_s=timeout_s)
    except RpcError as exc:
        if exc.code is StatusCode.UNAVAILABLE and agent.connection.closed.done():
            raise NotFound(f"cannot exec in container {container_id}: it has ended") from exc
        failed = AgentFailed(f"cannot exec in container {container_id}: {exc.message}", code=exc.code)
        failed.__cause__ = exc
        raise command_error(failed) from exc
    return GuestProcess(agent, container_id, exec_id, terminal=process.Terminal)


@contextlib.asynccontextmanager
async def start_in_vm(client: ControlClient, process: oci_pb2.Process) -> AsyncIterator[GuestProcess]:
    """Start a process (without arguments: a shell) at the debug console of the VM, which is hung up with the block.

    Raises ConsoleOff, ConsoleIsRaw, command errors as start_exec, NotFound if the sandbox ends.
    """
    sandbox_id, exec_id = client.record.sandbox_id, random_hex(16)
    request = agent_pb2.ExecProcessRequest(container_id=VM_ID, exec_id=exec_id, process=process)
    async with beside(client.hold(exec_id), name="hold"):  # first: we may be killed at any moment
        await asyncio.sleep(0)
        try:
            await client.agent.call("ExecProcess", request, timeout_s=CONSOLE_LIMIT_S)
        except RpcError as exc:
            raise _console_error(client, sandbox_id, exc) from exc
        yield GuestProcess(client.agent, VM_ID, exec_id, terminal=process.Terminal)


def _console_error(client: ControlClient, sandbox_id: str, exc: RpcError) -> KatapodError:
    what = f"cannot use the debug console of {sandbox_id}"
    if exc.code is StatusCode.FAILED_PRECONDITION:
        return ConsoleOff(f"{what}: it is off")
    if exc.code is StatusCode.UNIMPLEMENTED:
        return ConsoleIsRaw(f"{what}: {exc.message}")
    if exc.code is StatusCode.UNAVAILABLE and client.connection.closed.done():
        return NotFound(f"{what}: it has ended")
    if exc.code is StatusCode.DEADLINE_EXCEEDED:
        return AgentFailed(f"{what}: the guest does not answer", hint=f"see {client.paths.console_log}")
    failed = AgentFailed(f"{what}: {exc.message}", code=exc.code)
    failed.__cause__ = exc
    return command_error(failed)
