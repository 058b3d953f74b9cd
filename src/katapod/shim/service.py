"""containerd.task.v2.Task and v3.Task: messages in, messages out. Tasks does the work.

Source: api/runtime/task/v2/shim.proto of containerd.
"""

import logging
import os
import re
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from katapod.host.cgroup import host_cgroup_version
from katapod.model import oci
from katapod.model.errors import AlreadyExists, InvalidState, KatapodError, NotFound, SpecError, UsageError
from katapod.rpc.status import RpcError, StatusCode
from katapod.sandbox.errors import AgentFailed
from katapod.shim.pb import runtime_pb2, task_pb2
from katapod.shim.processes import ExecProcess, TaskProcess
from katapod.shim.stats import encode_stats
from katapod.shim.streams import IoUris
from katapod.shim.tasks import Tasks
from katapod.tasks import finish

__all__ = ["SERVICES", "TaskService"]

log = logging.getLogger(__name__)

SERVICES = ("containerd.task.v2.Task", "containerd.task.v3.Task")
WHOLE = frozenset({"Start", "Delete", "Pause", "Resume", "Update"})
"""Calls that are completed even if the client disconnects, as a restarting containerd does: an interrupted Start would
leave a running process whose exit nobody waits for. A Create is undone instead."""
PROCESS_DETAILS = "containerd.runc.v1.ProcessDetails"
RUNTIME_OPTIONS = ("runtimeoptions.v1.Options", "cri.runtimeoptions.v1.Options")

_CODES: tuple[tuple[type[KatapodError], StatusCode], ...] = (
    (NotFound, StatusCode.NOT_FOUND),
    (AlreadyExists, StatusCode.ALREADY_EXISTS),
    (InvalidState, StatusCode.FAILED_PRECONDITION),
    (UsageError, StatusCode.INVALID_ARGUMENT),
    (SpecError, StatusCode.INVALID_ARGUMENT),
)


def rpc_error(exc: KatapodError) -> RpcError:
    """The error for containerd: its own codes where it acts on them, and the hint in the text, as there is no field for
    it."""
    code = next((code for kind, code in _CODES if isinstance(exc, kind)), StatusCode.UNKNOWN)
    if isinstance(exc, AgentFailed) and exc.context.get("code") is StatusCode.NOT_FOUND:
        code = StatusCode.NOT_FOUND
    return RpcError(code, str(exc) + (f" ({exc.hint})" if exc.hint else ""))


class TaskService:
    def __init__(self, tasks: Tasks, shut_down: Callable[[], None]) -> None:
        self._tasks = tasks
        self._shut_down = shut_down
        self._methods: dict[str, tuple[Any, Callable[[Any], Coroutine[Any, Any, Any]]]] = {
            "State": (task_pb2.StateRequest, self._state),
            "Create": (task_pb2.CreateTaskRequest, self._create),
            "Start": (task_pb2.StartRequest, self._start),
            "Delete": (task_pb2.DeleteRequest, self._delete),
            "Pids": (task_pb2.PidsRequest, self._pids),
            "Pause": (task_pb2.PauseRequest, self._pause),
            "Resume": (task_pb2.ResumeRequest, self._resume),
            "Kill": (task_pb2.KillRequest, self._kill),
            "Exec": (task_pb2.ExecProcessRequest, self._exec),
            "ResizePty": (task_pb2.ResizePtyRequest, self._resize),
            "CloseIO": (task_pb2.CloseIORequest, self._close_io),
            "Update": (task_pb2.UpdateTaskRequest, self._update),
            "Wait": (task_pb2.WaitRequest, self._wait),
            "Stats": (task_pb2.StatsRequest, self._stats),
            "Connect": (task_pb2.ConnectRequest, self._connect),
            "Shutdown": (task_pb2.ShutdownRequest, self._shutdown),
        }

    async def handle(self, service: str, method: str, payload: bytes) -> bytes:
        """A ttrpc handler. Raises RpcError."""
        if service not in SERVICES:
            raise RpcError(StatusCode.UNIMPLEMENTED, f"service {service}")
        if method == "Checkpoint":
            raise RpcError(StatusCode.UNIMPLEMENTED, "cannot checkpoint: Katapod does not save running containers")
        if method not in self._methods:
            raise RpcError(StatusCode.UNIMPLEMENTED, f"method {method}")
        message, function = self._methods[method]
        try:
            request = message.FromString(payload)
        except Exception as exc:
            raise RpcError(StatusCode.INVALID_ARGUMENT, f"cannot parse the request of {method}: {exc}") from exc
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s %s", method, str(request).replace("\n", " "))
        began = time.monotonic()
        try:
            work = function(request)
            answer = await (finish(work, name=f"{method}-{request.id}") if method in WHOLE else work)
        except KatapodError as exc:
            log.info("%s failed: %s", method, exc)
            raise rpc_error(exc) from exc
        except OSError as exc:
            log.exception("%s failed", method)
            place = f": {os.fsdecode(exc.filename)}" if exc.filename else ""
            raise RpcError(StatusCode.UNKNOWN, f"{method} failed{place}: {exc.strerror or exc}") from exc
        finally:
            self._tasks.call_times.observe(_action(method), time.monotonic() - began)
        return answer.SerializeToString() if answer is not None else b""

    async def _create(self, request: task_pb2.CreateTaskRequest) -> task_pb2.CreateTaskResponse:
        if request.checkpoint:
            raise RpcError(StatusCode.UNIMPLEMENTED, f"cannot restore {request.id}: Katapod has no checkpoints")
        uris = IoUris(request.stdin, request.stdout, request.stderr, request.terminal)
        sources = [text for mount in request.rootfs for text in (mount.type, mount.source, *mount.options)]
        if any("\0" in text for text in (request.bundle, *sources)):
            raise UsageError(f"cannot create task {request.id}: a NUL character in the bundle or a mount")
        bundle = Path(request.bundle or os.getcwd())
        await self._tasks.create(request.id, bundle, list(request.rootfs), uris, _config_path(request))
        return task_pb2.CreateTaskResponse(pid=self._tasks.pid)

    async def _start(self, request: task_pb2.StartRequest) -> task_pb2.StartResponse:
        if request.exec_id:
            await self._tasks.start_exec(request.id, request.exec_id)
        else:
            await self._tasks.start(request.id)
        return task_pb2.StartResponse(pid=self._tasks.pid)

    async def _delete(self, request: task_pb2.DeleteRequest) -> task_pb2.DeleteResponse:
        pid = self._tasks.pid
        process = await self._tasks.delete(request.id, request.exec_id)
        answer = task_pb2.DeleteResponse(pid=pid, exit_status=process.exit_status)
        _set_time(answer.exited_at, process)
        return answer

    async def _state(self, request: task_pb2.StateRequest) -> task_pb2.StateResponse:
        task = self._tasks.find(request.id)
        process = self._tasks.find_process(request.id, request.exec_id)
        answer = task_pb2.StateResponse(
            id=request.id,
            bundle=str(task.bundle),
            pid=self._tasks.pid,
            status=process.status,
            stdin=process.uris.stdin,
            stdout=process.uris.stdout,
            stderr=process.uris.stderr,
            terminal=process.uris.terminal,
            exit_status=process.exit_status,
            exec_id=request.exec_id,
        )
        _set_time(answer.exited_at, process)
        return answer

    async def _pids(self, request: task_pb2.PidsRequest) -> task_pb2.PidsResponse:
        answer = task_pb2.PidsResponse()
        for pid, exec_id in await self._tasks.processes(request.id):
            process = answer.processes.add(pid=pid)
            if exec_id:
                process.info.type_url = PROCESS_DETAILS
                process.info.value = runtime_pb2.ProcessDetails(exec_id=exec_id).SerializeToString()
        return answer

    async def _pause(self, request: task_pb2.PauseRequest) -> None:
        await self._tasks.pause(request.id)

    async def _resume(self, request: task_pb2.ResumeRequest) -> None:
        await self._tasks.resume(request.id)

    async def _kill(self, request: task_pb2.KillRequest) -> None:
        await self._tasks.kill(request.id, request.exec_id, request.signal, request.all)

    async def _exec(self, request: task_pb2.ExecProcessRequest) -> None:
        process = oci.parse_process(request.spec.value, f"the process of exec {request.exec_id}")
        uris = IoUris(request.stdin, request.stdout, request.stderr, request.terminal)
        self._tasks.add_exec(request.id, request.exec_id, process, uris)

    async def _resize(self, request: task_pb2.ResizePtyRequest) -> None:
        await self._tasks.resize(request.id, request.exec_id, request.height, request.width)

    async def _close_io(self, request: task_pb2.CloseIORequest) -> None:
        if request.stdin:
            await self._tasks.close_input(request.id, request.exec_id)

    async def _update(self, request: task_pb2.UpdateTaskRequest) -> None:
        resources = oci.parse_resources(request.resources.value, f"the resources of task {request.id}")
        await self._tasks.update(request.id, resources)

    async def _wait(self, request: task_pb2.WaitRequest) -> task_pb2.WaitResponse:
        process = self._tasks.find_process(request.id, request.exec_id)
        await process.exited.wait()
        answer = task_pb2.WaitResponse(exit_status=process.exit_status)
        _set_time(answer.exited_at, process)
        return answer

    async def _stats(self, request: task_pb2.StatsRequest) -> task_pb2.StatsResponse:
        stats = await self._tasks.stats(request.id)
        answer = task_pb2.StatsResponse()
        answer.stats.type_url, answer.stats.value = encode_stats(stats, host_cgroup_version())
        return answer

    async def _connect(self, request: task_pb2.ConnectRequest) -> task_pb2.ConnectResponse:
        return task_pb2.ConnectResponse(shim_pid=os.getpid(), task_pid=self._tasks.pid)

    async def _shutdown(self, request: task_pb2.ShutdownRequest) -> None:
        if self._tasks.empty or request.now:
            self._shut_down()


def _action(method: str) -> str:
    """CloseIO to close_io: the name of a call in metrics."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", method).lower()


def _config_path(request: task_pb2.CreateTaskRequest) -> str:
    """The configuration that the engine names for this runtime; empty if it names none."""
    if request.options.type_url.rpartition("/")[2] not in RUNTIME_OPTIONS:
        return ""
    try:
        return str(runtime_pb2.Options.FromString(request.options.value).config_path)
    except Exception as exc:
        raise UsageError(f"cannot create task {request.id}: its runtime options cannot be parsed: {exc}") from exc


def _set_time(target: Any, process: TaskProcess | ExecProcess) -> None:
    if process.exited_ns:
        target.seconds, target.nanos = divmod(process.exited_ns, 10**9)
