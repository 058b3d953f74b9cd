"""The debug console: shells in the guest for root of the host, if agent.debug_console is set.

It is a separate process, forked from the agent, so that it works while the agent hangs. On its virtio-serial port, or a
vsock port that is not in upstream, it serves the exec calls of the agent protocol for the container VM_ID; on the vsock
port agent.debug_console_vport each connection is a raw shell in a terminal, as in upstream.
"""

from __future__ import annotations

import os
import signal

from katapod.agent import channel, log
from katapod.agent.loop import Loop, Tasks
from katapod.agent.paths import check_id
from katapod.agent.process import READ_MAX, Process, read_stdio, write_stdin
from katapod.agent.server import Server
from katapod.agent.shell import start_process
from katapod.rpc.console import CONSOLE_SERVICE_VPORT, VM_ID
from katapod.rpc.pb import agent_pb2, health_pb2
from katapod.rpc.status import RpcError, StatusCode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

    from katapod.agent.options import Options

__all__ = ["Shells", "fork_console", "serve_addresses"]

CONSOLE_PORT = "katapod.console.0"
SHELLS_MAX = 64
HUNG_UP_KEPT_S = 5.0
WAIT_S, POLL_S = 60.0, 0.05
DESCRIPTORS_MAX = 4096


class Shells:
    """The processes of the console, and the calls that concern them."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._running: dict[str, Process] = {}
        self._tasks = Tasks(loop, "shells")
        self._methods: dict[str, Callable[[Any], Coroutine[Any, None, Any]]] = {
            "grpc.Health/Check": self._check,
            "grpc.AgentService/ExecProcess": self._start,
            "grpc.AgentService/SignalProcess": self._signal,
            "grpc.AgentService/WaitProcess": self._wait,
            "grpc.AgentService/ReadStdout": self._read_stdout,
            "grpc.AgentService/ReadStderr": self._read_stderr,
            "grpc.AgentService/WriteStdin": self._write,
            "grpc.AgentService/CloseStdin": self._close_stdin,
            "grpc.AgentService/TtyWinResize": self._resize,
        }

    def find_method(self, service: str, method: str) -> Callable[[Any], Coroutine[Any, None, Any]] | None:
        return self._methods.get(f"{service}/{method}")

    def _find(self, request: Any) -> Process:
        process = self._running.get(request.exec_id)
        if request.container_id != VM_ID or process is None:
            raise RpcError(StatusCode.NOT_FOUND, f"no process {request.exec_id[:200]!r} of the debug console")
        return process

    async def _check(self, request: health_pb2.CheckRequest) -> health_pb2.HealthCheckResponse:
        return health_pb2.HealthCheckResponse(status="SERVING")

    async def _start(self, request: agent_pb2.ExecProcessRequest) -> None:
        if request.container_id != VM_ID:
            raise RpcError(StatusCode.INVALID_ARGUMENT, "the debug console does not run processes in containers")
        exec_id = check_id(request.exec_id, "exec id")
        if exec_id in self._running:
            raise RpcError(StatusCode.ALREADY_EXISTS, f"process {exec_id} already exists")
        if len(self._running) >= SHELLS_MAX:
            raise RpcError(StatusCode.RESOURCE_EXHAUSTED, f"the debug console has too many processes ({SHELLS_MAX})")
        spec = request.process
        rows, columns = spec.ConsoleSize.Height, spec.ConsoleSize.Width
        size = (rows, columns) if spec.Terminal and rows and columns else None
        self._running[exec_id] = start_process(
            self._loop, exec_id, list(spec.Args), spec.Env, spec.Cwd, terminal=spec.Terminal, size=size
        )

    async def _signal(self, request: agent_pb2.SignalProcessRequest) -> None:
        process = self._find(request)
        if request.signal == signal.SIGHUP:
            hang_up(process)
            self._tasks.spawn("forget", self._forget_later(process))
        else:
            _kill_group(process, request.signal)

    async def _wait(self, request: agent_pb2.WaitProcessRequest) -> agent_pb2.WaitProcessResponse:
        process = self._find(request)
        status = await process.ended
        process.waited = True
        self._drop_read_out(process)
        return agent_pb2.WaitProcessResponse(status=status)

    async def _read_stdout(self, request: agent_pb2.ReadStreamRequest) -> agent_pb2.ReadStreamResponse:
        process = self._find(request)
        data = await read_stdio(self._loop, process, process.stdio.stdout, request.len)
        self._drop_read_out(process)
        return agent_pb2.ReadStreamResponse(data=data)

    async def _read_stderr(self, request: agent_pb2.ReadStreamRequest) -> agent_pb2.ReadStreamResponse:
        process = self._find(request)
        if process.stdio.stderr is None:  # a terminal has a single stream
            return agent_pb2.ReadStreamResponse()
        data = await read_stdio(self._loop, process, process.stdio.stderr, request.len)
        self._drop_read_out(process)
        return agent_pb2.ReadStreamResponse(data=data)

    async def _write(self, request: agent_pb2.WriteStreamRequest) -> agent_pb2.WriteStreamResponse:
        return agent_pb2.WriteStreamResponse(len=await write_stdin(self._loop, self._find(request), request.data))

    async def _close_stdin(self, request: agent_pb2.CloseStdinRequest) -> None:
        process = self._find(request)
        if not process.stdio.terminal:
            await write_stdin(self._loop, process, b"")  # after what is still being written

    async def _resize(self, request: agent_pb2.TtyWinResizeRequest) -> None:
        process = self._find(request)
        if process.stdio.stdin >= 0 or not process.stdio.terminal:
            process.stdio.resize(request.row, request.column)

    def _drop_read_out(self, process: Process) -> None:
        """Forget a process whose exit status and output have been delivered."""
        if process.waited and process.stdio.drained:
            self._forget(process)

    async def _forget_later(self, process: Process) -> None:
        """A client that has hung up may still ask for the exit status."""
        await process.ended
        await self._loop.sleep(HUNG_UP_KEPT_S)
        self._forget(process)

    def _forget(self, process: Process) -> None:
        process.stdio.close()
        self._running.pop(process.exec_id, None)


def _kill_group(process: Process, number: int) -> None:
    """Raises RpcError for an invalid signal number."""
    if process.ended.done:
        return
    if not 0 < number <= 64:
        raise RpcError(StatusCode.INVALID_ARGUMENT, f"cannot signal: invalid signal {number}")
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


def hang_up(process: Process) -> None:
    """As on the loss of a terminal: SIGHUP, also for the shell's foreground process group, and the end of its
    streams."""
    _kill_group(process, signal.SIGHUP)
    process.stdio.close()


async def _serve_raw(loop: Loop, stream: channel.Stream) -> bool:
    """One connection is one shell in a terminal."""
    try:
        process = start_process(loop, "raw", [], (), "", terminal=True)
    except (OSError, RpcError) as exc:
        await stream.write(f"kata-agent: {exc}\r\n".encode())
        return True
    tasks = Tasks(loop, "console")

    async def to_host() -> None:
        try:
            while data := await read_stdio(loop, process, process.stdio.stdout, READ_MAX):
                await stream.write(data)
        except OSError as exc:
            log.debug(f"a client of the debug console has disconnected: {exc}")

    async def from_host() -> None:
        try:
            while data := await stream.read():
                await write_stdin(loop, process, data)
        except (OSError, RpcError) as exc:
            log.debug(f"the debug console has stopped reading: {exc}")

    try:
        out = tasks.spawn("out", to_host())
        await loop.wait_any([out, tasks.spawn("in", from_host())])
        if process.ended.done:
            await out
    finally:
        tasks.cancel()
        hang_up(process)
    return True


async def serve_addresses(loop: Loop, raw: str, service: str) -> None:
    """Serve raw shells at the address `raw` and calls at `service`, forever. Raises OSError."""
    server = Server(loop, Shells(loop).find_method)
    tasks = Tasks(loop, "console")

    async def shell(stream: channel.Stream) -> bool:
        return await _serve_raw(loop, stream)

    listeners = channel.Listener(loop, raw), channel.Listener(loop, service)
    await loop.wait_any(
        [
            tasks.spawn("raw", channel.listen(loop, listeners[0], shell)),
            tasks.spawn("service", channel.listen(loop, listeners[1], server.serve)),
        ]
    )


async def _serve(loop: Loop, options: Options, has_vsock: Callable[[], bool]) -> None:
    """Serve on the port if there is one, else on vsock, forever. Raises OSError if there is neither."""
    for _ in range(int(WAIT_S / POLL_S)):
        path = channel.find_port(CONSOLE_PORT)
        if path is not None:
            server = Server(loop, Shells(loop).find_method)
            server.reset_ids = True
            await channel.serve_port(loop, path, server.serve, lambda: None)
        if has_vsock():
            try:
                await serve_addresses(
                    loop, f"vsock://-1:{options.debug_console_vport}", f"vsock://-1:{CONSOLE_SERVICE_VPORT}"
                )
            except OSError as exc:  # the agent has not loaded the module yet
                log.debug(f"the debug console waits: {exc}")
        await loop.sleep(POLL_S)
    raise OSError(19, f"no virtio-serial port is named {CONSOLE_PORT}, and there is no vsock")


def fork_console(options: Options, has_vsock: Callable[[], bool]) -> int:
    """Start the console's process; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        with open("/proc/self/comm", "w") as handle:
            handle.write("kata-console")
        os.closerange(3, DESCRIPTORS_MAX)  # above all the agent's port, which can be open only once
        loop = Loop()
        loop.run(_serve(loop, options, has_vsock))
    except BaseException as exc:
        log.error(f"there is no debug console: {exc!r}")
    finally:
        os._exit(code)
