"""The supervisor's control server for other commands: a ttrpc socket in the sandbox's state directory.

It serves two things: `katapod.Control` (JSON messages of our own) for what concerns the sandbox's life,
and the part of `grpc.AgentService` that concerns execs, passed on to the guest as it is: the agent's
channel has one end only, and the supervisor holds it; so has the debug console's, whose container is VM_ID. Only root
can connect.
"""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec

from katapod.model.errors import InvalidState, KatapodError, NotFound
from katapod.model.exit_status import KILLED_STATUS
from katapod.model.layout import SandboxPaths
from katapod.rpc.agent import AGENT_SERVICE
from katapod.rpc.console import VM_ID
from katapod.rpc.pb import agent_pb2
from katapod.rpc.server import serve_ttrpc
from katapod.rpc.status import RpcError, StatusCode
from katapod.sandbox.client import (
    CONTROL_SERVICE,
    ContainerRequest,
    HoldRequest,
    KillRequest,
    UpdateRequest,
    WaitAnswer,
)
from katapod.sandbox.container import Container
from katapod.sandbox.guard import CAUSE_LIMIT_S
from katapod.sandbox.lifecycle import Sandbox
from katapod.tasks import beside

__all__ = ["control_socket"]

# Methods a client may use in the guest, and the request's class, to see which process it is about:
# the container's own streams and end belong to the supervisor.
_PASSED: dict[str, Any] = {
    "ExecProcess": agent_pb2.ExecProcessRequest,
    "StatsContainer": None,
    "GetMetrics": None,
    "WaitProcess": agent_pb2.WaitProcessRequest,
    "WriteStdin": agent_pb2.WriteStreamRequest,
    "CloseStdin": agent_pb2.CloseStdinRequest,
    "ReadStdout": agent_pb2.ReadStreamRequest,
    "ReadStderr": agent_pb2.ReadStreamRequest,
    "TtyWinResize": agent_pb2.TtyWinResizeRequest,
    "SignalProcess": agent_pb2.SignalProcessRequest,
}


class _Control:
    def __init__(self, containers: Callable[[], list[Container]], shut_down: Callable[[], None]) -> None:
        self._containers = containers
        self._shut_down = shut_down
        self._methods: dict[str, Callable[[bytes], Awaitable[bytes | None]]] = {
            "Kill": self._kill,
            "Pause": self._pause,
            "Resume": self._resume,
            "Wait": self._wait,
            "Update": self._update,
            "Hold": self._hold,
            "ShutDown": self._stop,
        }

    def _find(self, container_id: str) -> Container:
        for container in self._containers():
            if container.container_id == container_id:
                return container
        raise NotFound(f"cannot find container {container_id} in its sandbox")

    async def handle(self, service: str, method: str, payload: bytes) -> bytes:
        if service == AGENT_SERVICE:
            return await self._pass_on(method, payload)
        if service != CONTROL_SERVICE:
            raise RpcError(StatusCode.UNIMPLEMENTED, f"service {service}")
        if method not in self._methods:
            raise RpcError(StatusCode.UNIMPLEMENTED, f"method {method}")
        try:
            return await self._methods[method](payload) or b""
        except NotFound as exc:
            raise RpcError(StatusCode.NOT_FOUND, str(exc)) from exc
        except InvalidState as exc:
            raise RpcError(StatusCode.FAILED_PRECONDITION, str(exc)) from exc
        except (KatapodError, msgspec.DecodeError) as exc:
            raise RpcError(StatusCode.INTERNAL, str(exc)) from exc

    def _sandbox(self) -> Sandbox:
        containers = self._containers()
        if not containers:
            raise RpcError(StatusCode.UNAVAILABLE, "the container is not running yet")
        return containers[0].sandbox

    async def _pass_on(self, method: str, payload: bytes) -> bytes:
        if method not in _PASSED:
            raise RpcError(StatusCode.PERMISSION_DENIED, f"{method} is reserved for the supervisor")
        request_class, to_console = _PASSED[method], False
        if request_class is not None:
            request = request_class.FromString(payload)
            if request.exec_id in ("", request.container_id):
                raise RpcError(
                    StatusCode.PERMISSION_DENIED, f"{method} on the container's own process is the supervisor's"
                )
            to_console = request.container_id == VM_ID
        sandbox = self._sandbox()
        connection = await sandbox.console.connect() if to_console else sandbox.agent.connection
        in_turn = sandbox.agent.launches if method == "ExecProcess" and not to_console else contextlib.nullcontext()

        async def ask() -> bytes:
            async with in_turn:
                return await connection.call_raw(AGENT_SERVICE, method, payload, None)

        async with beside(ask(), name="pass-on") as call:
            waiting: set[asyncio.Future[Any]] = {call, sandbox.death}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if call.done():
                try:
                    return call.result()
                except RpcError as exc:
                    if exc.code is not StatusCode.UNAVAILABLE:
                        raise
                    # the channel to the guest breaks a moment before its cause is known
                    await asyncio.wait({sandbox.death}, timeout=CAUSE_LIMIT_S)
                    if not sandbox.death.done():
                        if sandbox.closing:
                            raise RpcError(StatusCode.UNAVAILABLE, "the sandbox has ended") from exc
                        raise
            raise RpcError(StatusCode.UNAVAILABLE, str(sandbox.death.result()))

    async def _kill(self, payload: bytes) -> None:
        request = msgspec.json.decode(payload, type=KillRequest)
        container = self._find(request.container_id)
        if request.signal in (signal.SIGKILL, container.plan.stop_signal):
            container.note_stop_asked()
        await container.kill(request.signal)
        container.tell("kill", signal=request.signal)

    async def _pause(self, payload: bytes) -> None:
        await self._find(msgspec.json.decode(payload, type=ContainerRequest).container_id).pause()

    async def _resume(self, payload: bytes) -> None:
        await self._find(msgspec.json.decode(payload, type=ContainerRequest).container_id).resume()

    async def _wait(self, payload: bytes) -> bytes:
        """Answered when the container has ended, by its exit status; by the sandbox's death if that comes first."""
        container = self._find(msgspec.json.decode(payload, type=ContainerRequest).container_id)
        async with beside(container.ended.wait(), name="wait-ended") as ended:
            waiting: set[asyncio.Future[Any]] = {ended, container.sandbox.death}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        code = container.record.exit_code
        return msgspec.json.encode(WaitAnswer(KILLED_STATUS if code is None else code))

    async def _update(self, payload: bytes) -> None:
        request = msgspec.json.decode(payload, type=UpdateRequest)
        container = self._find(request.container_id)
        limit = request.resources.memory.limit if request.resources.memory else None
        room = container.sandbox.record.mem_mib << 20
        if limit is not None and limit > room:
            raise KatapodError(
                f"cannot update container {request.container_id}: its VM has {room >> 20} MiB, and stays as large"
            )
        await container.update(request.resources)

    async def _hold(self, payload: bytes) -> None:
        """Answered when the sandbox dies. When the caller goes first, so does its process of the debug console."""
        request = msgspec.json.decode(payload, type=HoldRequest)
        sandbox = self._sandbox()
        sandbox.console.sessions += 1
        try:
            await asyncio.wait({sandbox.death})
        finally:
            sandbox.console.sessions -= 1
            sandbox.console.hang_up(request.exec_id)

    async def _stop(self, payload: bytes) -> None:
        self._shut_down()


@contextlib.asynccontextmanager
async def control_socket(
    paths: SandboxPaths,
    containers: Callable[[], list[Container]],
    shut_down: Callable[[], None],
    afterwards: contextlib.AsyncExitStack,
) -> AsyncIterator[None]:
    """Serve the control socket while the block runs. Who is connected then keeps its connection until `afterwards` is
    closed, which is when the VM has ended: its calls are answered by that end."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(paths.control_socket))
        os.chmod(paths.control_socket, 0o600)
        server = await serve_ttrpc(listener, _Control(containers, shut_down).handle)
    except BaseException:
        listener.close()
        raise
    afterwards.push_async_callback(server.wait_closed)
    try:
        yield
    finally:
        server.close()
        with contextlib.suppress(FileNotFoundError):
            paths.control_socket.unlink()
