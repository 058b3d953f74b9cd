"""A guest without a machine: the agent protocol over a real ttrpc connection, with processes that tests end by hand.

What stands above it is real: agent client, Container, streams, Tasks, TaskService and its socket. Only the sandbox's
own life (VMM, shared directory, networks) is left out.
"""

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import msgspec
import pytest

from katapod.host.state import StateStore
from katapod.model.config import Config
from katapod.model.errors import KatapodError, NotFound
from katapod.model.record import SandboxRecord, State
from katapod.model.sizing import ContainerLimits
from katapod.rpc.agent import AGENT_SERVICE, GUEST_SERVICE, AgentClient
from katapod.rpc.client import TtrpcClient
from katapod.rpc.pb import agent_pb2, katapod_pb2
from katapod.rpc.pb._load import class_of
from katapod.rpc.server import TtrpcServer, serve_ttrpc
from katapod.rpc.status import RpcError, StatusCode
from katapod.sandbox import guard as guard_module
from katapod.sandbox.clock import ClockKeeper
from katapod.sandbox.container import Container, ContainerPlan
from katapod.sandbox.guard import guarded
from katapod.sandbox.opening import SandboxServer
from katapod.sandbox.request import SandboxRequest
from katapod.shim import tasks as tasks_module
from katapod.shim.events import EventPublisher
from katapod.shim.pb import task_pb2
from katapod.shim.service import SERVICES, TaskService
from katapod.shim.tasks import Tasks
from kit.library import layout_below
from kit.loop_time import LIMIT_S

__all__ = ["VMM_PID", "Guest", "GuestPod", "Shim", "bundle_at", "listening", "shim_at"]

_T = TypeVar("_T")
VMM_PID = 4242
_METHODS = agent_pb2.DESCRIPTOR.services_by_name["AgentService"].methods_by_name


class Process:
    """In the guest. It ends when a test says so, or by SIGKILL."""

    def __init__(self) -> None:
        self.output = b""
        self.held = False  # by another, which writes with `say` until it lets go
        self.more = asyncio.Event()
        self.input = b""
        self.input_closed = asyncio.Event()
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def say(self, data: bytes, *, last: bool = False) -> None:
        self.output += data
        self.held = not last
        self.more.set()

    def end(self, status: int) -> None:
        if not self.ended.done():
            self.ended.set_result(status)


class Guest:
    """The agent. `fail`: methods that answer with this; `hold`: methods that answer when the event is set."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.requests: dict[str, Any] = {}
        self.processes: dict[str, Process] = {}
        self.execs: list[Process] = []
        self.fail: dict[str, RpcError] = {}
        self.hold: dict[str, asyncio.Event] = {}
        self.out_of_memory: asyncio.Queue[str] = asyncio.Queue()

    async def handle(self, service: str, method: str, payload: bytes) -> bytes:
        if service == GUEST_SERVICE:
            return await self._of_our_own(method)
        assert service == AGENT_SERVICE
        request = class_of(_METHODS[method].input_type).FromString(payload)
        self.calls.append(method)
        self.requests[method] = request
        if method in self.hold:
            await self.hold[method].wait()
        if method in self.fail:
            raise self.fail[method]
        function = getattr(self, f"_{method}", None)
        answer = await function(request) if function is not None else None
        return answer.SerializeToString() if answer is not None else b""

    async def _of_our_own(self, method: str) -> bytes:
        if method != "Processes" or method in self.fail:
            raise RpcError(StatusCode.UNIMPLEMENTED, f"method {method}")
        answer = katapod_pb2.ProcessesResponse()
        for number, exec_id in enumerate(self.processes, 10):
            answer.processes.add(pid=number, exec_id=exec_id if number > 10 else "")
        return answer.SerializeToString()

    def _of(self, request: Any) -> Process:
        return self.processes[request.exec_id or request.container_id]

    async def _StartContainer(self, request: Any) -> None:
        self.processes[request.container_id] = Process()

    async def _ExecProcess(self, request: Any) -> None:
        self.processes[request.exec_id] = Process()
        self.execs.append(self.processes[request.exec_id])

    async def _ReadStdout(self, request: Any) -> Any:
        process = self._of(request)
        while process.held and not process.output:
            await process.more.wait()
            process.more.clear()
        if not process.output:
            await process.ended
        data, process.output = process.output[: request.len], process.output[request.len :]
        return agent_pb2.ReadStreamResponse(data=data)

    async def _ReadStderr(self, request: Any) -> Any:
        await self._of(request).ended
        return agent_pb2.ReadStreamResponse()

    async def _WriteStdin(self, request: Any) -> Any:
        self._of(request).input += request.data
        return agent_pb2.WriteStreamResponse(len=len(request.data))

    async def _CloseStdin(self, request: Any) -> None:
        self._of(request).input_closed.set()

    async def _WaitProcess(self, request: Any) -> Any:
        return agent_pb2.WaitProcessResponse(status=await self._of(request).ended)

    async def _SignalProcess(self, request: Any) -> None:
        process = self.processes.get(request.exec_id or request.container_id)
        if process is not None and request.signal == 9:
            process.end(137)

    async def _GetOOMEvent(self, request: Any) -> Any:
        return agent_pb2.OOMEvent(container_id=await self.out_of_memory.get())


class GuestSandbox:
    """What containers need of their sandbox."""

    def __init__(self, sandbox_id: str, agent: AgentClient, store: StateStore) -> None:
        self.sandbox_id = sandbox_id
        self.agent = agent
        self.store = store
        self.vm = SimpleNamespace(pid=VMM_PID)
        self.clock = ClockKeeper(agent, sandbox_id)
        self.record = SandboxRecord(sandbox_id=sandbox_id, created_at=time.time(), supervisor_pid=0, boot_id="")
        self.death: asyncio.Future[KatapodError] = asyncio.get_running_loop().create_future()
        self.rescans = 0
        self.network = None

    def save(self, **changes: Any) -> None:
        self.record = msgspec.structs.replace(self.record, **changes)

    async def guard(self, work: Coroutine[Any, Any, _T]) -> _T:
        return await guarded(work, self.death, self.sandbox_id)

    async def rescan_network(self) -> bool:
        self.rescans += 1
        return False


class GuestPod:
    """A pod whose machine is `guest`. `closing`: its end takes until this is set."""

    def __init__(
        self, request: SandboxRequest, config: Config, sandbox: GuestSandbox, servers: Sequence[SandboxServer]
    ) -> None:
        self.request = request
        self.servers = servers
        self.config = config
        self.sandbox = sandbox
        self.containers: dict[str, Container] = {}
        self.limits: dict[str, ContainerLimits] = {}
        self.closed = asyncio.Event()
        self.may_close = asyncio.Event()
        self.may_close.set()
        self.close_error: KatapodError | None = None

    async def create_container(self, plan: ContainerPlan, limits: ContainerLimits | None) -> Container:
        self.sandbox.save(containers=(*self.sandbox.record.containers, plan.record()))
        await self.sandbox.guard(self.sandbox.agent.call("CreateContainer", agent_pb2.CreateContainerRequest()))
        container = self.containers[plan.container_id] = Container(self.sandbox, plan)  # type: ignore[arg-type]
        container.save(state=State.CREATED)
        if limits is not None:
            self.limits[plan.container_id] = limits
        return container

    async def resize_for(self, container_id: str, limits: ContainerLimits) -> None:
        self.limits[container_id] = limits

    async def remove_container(self, container_id: str) -> None:
        if container_id not in self.containers:
            raise NotFound(f"cannot find container {container_id}")
        request = agent_pb2.RemoveContainerRequest(container_id=container_id)
        await self.sandbox.guard(self.sandbox.agent.call("RemoveContainer", request))
        del self.containers[container_id]

    async def close(self) -> None:
        self.sandbox.agent.connection.close()
        self.closed.set()
        await self.may_close.wait()
        if self.close_error is not None:
            raise self.close_error


class Publisher(EventPublisher):
    """Keeps what was published: (topic, event). `for_crio`: stands for no publisher, as under CRI-O."""

    def __init__(self) -> None:
        super().__init__("", "k8s.io")
        self.told: list[tuple[str, Any]] = []
        self.for_crio = False

    @property
    def connected(self) -> bool:
        return not self.for_crio

    def publish(self, topic: str, event: Any) -> None:
        super().publish(topic, event)
        self.told.append((topic, event))

    @property
    def topics(self) -> list[str]:
        return [topic for topic, _ in self.told]

    def exits(self) -> dict[str, int]:
        return {event.id: event.exit_status for topic, event in self.told if topic == "/tasks/exit"}


class Shim:
    """A served shim and a client of it, as containerd has them."""

    def __init__(self, folder: Path, guest: Guest, tasks: Tasks, events: Publisher) -> None:
        self.folder = folder
        self.guest = guest
        self.tasks = tasks
        self.events = events
        self.shut_down = asyncio.Event()
        self.config_paths: list[str] = []
        self.path = str(folder / "shim.sock")
        self.client: TtrpcClient

    @property
    def pod(self) -> GuestPod:
        pod: Any = self.tasks.pod
        assert isinstance(pod, GuestPod)
        return pod

    async def connect(self) -> TtrpcClient:
        return await TtrpcClient.on_unix_path(self.path, "the shim")

    async def call(self, method: str, *, version: int = 2, via: TtrpcClient | None = None, **fields: Any) -> Any:
        """Call Task.`method` with a request of these fields; returns the answer. Raises RpcError."""
        names = {"Exec": "ExecProcess", "Create": "CreateTask", "Update": "UpdateTask"}
        request = getattr(task_pb2, f"{names.get(method, method)}Request")(**fields)
        client = via or self.client
        data = await client.call_raw(SERVICES[version - 2], method, request.SerializeToString(), LIMIT_S)
        name = f"{names.get(method, method)}Response"
        return getattr(task_pb2, name).FromString(data) if hasattr(task_pb2, name) else data

    async def refused(self, method: str, code: StatusCode, **fields: Any) -> str:
        """The message of a call that is refused with `code`."""
        with pytest.raises(RpcError) as caught:
            await self.call(method, **fields)
        assert caught.value.code is code, caught.value
        return caught.value.message

    async def create(self, container_id: str = "c1", *, start: bool = False, pod: str = "", **fields: Any) -> Path:
        """Create a task in a bundle of its own, of the pod `pod` if that is given; returns the bundle."""
        annotations = {}
        if pod:
            annotations = {
                "io.kubernetes.cri.container-type": "sandbox" if pod == container_id else "container",
                "io.kubernetes.cri.sandbox-id": pod,
            }
        bundle = bundle_at(self.folder / container_id, annotations)
        await self.call("Create", id=container_id, bundle=str(bundle), **fields)
        if start:
            await self.call("Start", id=container_id)
        return bundle

    async def status(self, container_id: str = "c1", exec_id: str = "") -> int:
        answer = await self.call("State", id=container_id, exec_id=exec_id)
        return int(answer.status)


def bundle_at(path: Path, annotations: dict[str, str] | None = None, **process: Any) -> Path:
    """A bundle with the least that a config.json may have."""
    path.mkdir(exist_ok=True)
    spec = {
        "ociVersion": "1.0.2",
        "process": {"args": ["true"], "cwd": "/", "user": {"uid": 0, "gid": 0}, **process},
        "root": {"path": "rootfs"},
        "annotations": annotations or {},
        "linux": {"namespaces": [{"type": "network", "path": "/run/netns/x"}, {"type": "pid"}]},
    }
    (path / "config.json").write_text(json.dumps(spec))
    return path


@contextlib.asynccontextmanager
async def shim_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Shim]:
    """A shim whose pods run on a Guest, on a socket in `folder`."""
    guest, events = Guest(), Publisher()
    store: Any = None  # the pod's, which has none here

    def load(path: str, annotations: Mapping[str, str]) -> Config:
        shim.config_paths.append(path)
        return Config()

    tasks = Tasks("k8s.io", store, load, events)
    shim = Shim(folder, guest, tasks, events)

    async def open_guest_pod(
        request: SandboxRequest, config: Config, store: object, servers: Sequence[SandboxServer]
    ) -> GuestPod:
        path = str(folder / f"agent-{len(agents)}.sock")
        agents.append(await serve_ttrpc(listening(path), guest.handle))
        agent = AgentClient(await TtrpcClient.on_unix_path(path, "the agent"))
        sandbox = GuestSandbox(request.sandbox_id, agent, StateStore(layout_below(folder)))
        return GuestPod(request, config, sandbox, servers)

    agents: list[TtrpcServer] = []
    monkeypatch.setattr(tasks_module, "open_sandbox", open_guest_pod)
    monkeypatch.setattr(guard_module, "CAUSE_LIMIT_S", 0.05)  # no process here dies a moment after its connection
    server = await serve_ttrpc(listening(shim.path), TaskService(tasks, shim.shut_down.set).handle)
    shim.client = await shim.connect()
    try:
        yield shim
    finally:
        await tasks.end()
        await events.close()
        shim.client.close()
        for each in (server, *agents):
            each.close()
        await asyncio.sleep(0)


def listening(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    return listener
