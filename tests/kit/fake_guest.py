"""An agent that is no agent, with processes that do something: for a FakeVmm, whose sandboxes run containers by it.

What a process does is a coroutine of this program, by the name of its command (PROGRAMS). Signals end it.
"""

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from katapod.rpc.framing import FrameDecoder, encode_response, parse_request
from katapod.rpc.pb import agent_pb2, katapod_pb2
from katapod.rpc.status import RpcError, StatusCode
from katapod.tasks import beside, end_tasks
from kit.fake_vmm import FakeAgent

__all__ = ["PROGRAMS", "FakeGuest", "FakeProcess"]

PIPE_BYTES = 65536


class FakeProcess:
    """`output` and `errors` are what it has written and nobody has read yet."""

    def __init__(self, args: list[str], env: list[str]) -> None:
        self.args = args
        self.env = env
        self.input = b""
        self.input_ended = False
        self.output = {"ReadStdout": b"", "ReadStderr": b""}
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.changed = asyncio.Condition()

    async def change(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def until(self, condition: Callable[[], object]) -> None:
        async with self.changed:
            await self.changed.wait_for(condition)

    async def write(self, data: bytes, stream: str = "ReadStdout") -> None:
        await self.until(lambda: len(self.output[stream]) < PIPE_BYTES)
        self.output[stream] += data
        await self.change()

    async def read(self) -> bytes:
        await self.until(lambda: self.input or self.input_ended)
        data, self.input = self.input, b""
        return data

    async def run(self) -> None:
        async with beside(PROGRAMS[self.args[0]](self), name="program") as program:
            await asyncio.wait({program, self.ended}, return_when=asyncio.FIRST_COMPLETED)
            if program.done():
                await self.end(program.result())

    async def end(self, status: int) -> None:
        if not self.ended.done():
            self.ended.set_result(status)
        await self.change()


async def _cat(process: FakeProcess) -> int:
    while data := await process.read():
        await process.write(data)
    return 0


async def _echo(process: FakeProcess) -> int:
    await process.write(" ".join(process.args[1:]).encode() + b"\n")
    return 0


async def _env(process: FakeProcess) -> int:
    await process.write("".join(f"{entry}\n" for entry in process.env).encode())
    return 0


async def _false(process: FakeProcess) -> int:
    await process.write(b"no\n", "ReadStderr")
    return 1


async def _sleep(process: FakeProcess) -> int:
    await process.ended
    return 0


async def _yes(process: FakeProcess) -> int:
    while True:
        await process.write(b"y\n" * 8192)


PROGRAMS: dict[str, Callable[[FakeProcess], Coroutine[Any, Any, int]]] = {
    "cat": _cat,
    "echo": _echo,
    "env": _env,
    "false": _false,
    "sleep": _sleep,
    "yes": _yes,
}


class Work:
    """Tasks of one machine."""

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[None]] = set()

    def add(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


@dataclass
class FakeGuest(FakeAgent):
    """Calls are answered side by side, as an agent does. One serves all machines of a FakeVmm."""

    processes: dict[tuple[str, str], FakeProcess] = field(default_factory=dict)

    async def serve(self, sock: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=sock)
        decoder, work = FrameDecoder(), Work()
        try:
            while data := await reader.read(1 << 16):
                for frame in decoder.feed(data):
                    work.add(self._handle(frame.stream_id, parse_request(frame), writer, work))
        except ConnectionError:
            pass
        finally:
            await end_tasks(work.tasks)
            writer.close()

    async def _handle(self, stream_id: int, request: Any, writer: asyncio.StreamWriter, work: Work) -> None:
        self.asked.append(request.method)
        answer = b""
        try:
            if request.method in self.before:
                await self.before[request.method]()
            if request.method in self.refuses:
                raise self.refuses[request.method]
            if request.method in ("StartContainer", "ExecProcess"):
                work.add(getattr(self, f"_{request.method}")(request.payload).run())
            elif function := getattr(self, f"_{request.method}", None):
                message = await function(request.payload)
                answer = message.SerializeToString() if message is not None else b""
        except RpcError as exc:
            writer.write(encode_response(stream_id, code=exc.code, message=exc.message))
            return
        with contextlib.suppress(ConnectionError):
            writer.write(encode_response(stream_id, answer))

    def _of(self, request: Any) -> FakeProcess:
        try:
            return self.processes[request.container_id, request.exec_id or request.container_id]
        except KeyError:
            raise RpcError(StatusCode.NOT_FOUND, "no such process") from None

    def _add(self, container_id: str, exec_id: str, process: Any) -> FakeProcess:
        if process.Args[0] not in PROGRAMS:
            raise RpcError(StatusCode.NOT_FOUND, f"cannot run {process.Args[0]}: not found in the container")
        made = self.processes[container_id, exec_id] = FakeProcess(list(process.Args), list(process.Env))
        return made

    async def _Clock(self, payload: bytes) -> Any:
        return katapod_pb2.ClockResponse(time_ns=time.time_ns())

    async def _CreateContainer(self, payload: bytes) -> None:
        request = agent_pb2.CreateContainerRequest.FromString(payload)
        self._add(request.container_id, request.container_id, request.OCI.Process)

    def _StartContainer(self, payload: bytes) -> FakeProcess:
        container_id = agent_pb2.StartContainerRequest.FromString(payload).container_id
        return self.processes[container_id, container_id]

    def _ExecProcess(self, payload: bytes) -> FakeProcess:
        request = agent_pb2.ExecProcessRequest.FromString(payload)
        return self._add(request.container_id, request.exec_id, request.process)

    async def _RemoveContainer(self, payload: bytes) -> None:
        container_id = agent_pb2.RemoveContainerRequest.FromString(payload).container_id
        self.processes = {place: each for place, each in self.processes.items() if place[0] != container_id}

    async def _WriteStdin(self, payload: bytes) -> Any:
        request = agent_pb2.WriteStreamRequest.FromString(payload)
        process = self._of(request)
        await process.until(lambda: len(process.input) < PIPE_BYTES or process.ended.done())
        process.input += request.data
        await process.change()
        return agent_pb2.WriteStreamResponse(len=len(request.data))

    async def _CloseStdin(self, payload: bytes) -> None:
        process = self._of(agent_pb2.CloseStdinRequest.FromString(payload))
        process.input_ended = True
        await process.change()

    async def _ReadStdout(self, payload: bytes) -> Any:
        return await self._read(payload, "ReadStdout")

    async def _ReadStderr(self, payload: bytes) -> Any:
        return await self._read(payload, "ReadStderr")

    async def _read(self, payload: bytes, stream: str) -> Any:
        request = agent_pb2.ReadStreamRequest.FromString(payload)
        process = self._of(request)
        await process.until(lambda: process.output[stream] or process.ended.done())
        written = process.output[stream]
        process.output[stream] = written[request.len :]
        await process.change()
        return agent_pb2.ReadStreamResponse(data=written[: request.len])

    async def _WaitProcess(self, payload: bytes) -> Any:
        process = self._of(agent_pb2.WaitProcessRequest.FromString(payload))
        return agent_pb2.WaitProcessResponse(status=await asyncio.shield(process.ended))

    async def _SignalProcess(self, payload: bytes) -> None:
        request = agent_pb2.SignalProcessRequest.FromString(payload)
        everyone = request.signal == signal.SIGKILL and not request.exec_id
        for (container_id, exec_id), process in list(self.processes.items()):
            if container_id == request.container_id and (everyone or exec_id == request.exec_id):
                await process.end(128 + request.signal)

    async def _GetOOMEvent(self, payload: bytes) -> None:
        await asyncio.get_running_loop().create_future()
