"""containerd's tasks, carried out on a pod: create, start, exec, kill, delete, and the events about them.

An event is published after what it reports has happened, for a process in the order create, start, exit, delete.
Source: api/runtime/task/v2/shim.proto and core/runtime/v2/README.md of containerd.
"""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from katapod.host.mounts import mount_given, unmount_below
from katapod.host.state import StateStore
from katapod.model import oci
from katapod.model.annotations import PodAnnotations, parse_annotations
from katapod.model.config import Config
from katapod.model.errors import AlreadyExists, InvalidState, KatapodError, NotFound
from katapod.model.exit_status import KILLED_STATUS
from katapod.model.ids import parse_container_name
from katapod.observe.management_server import management_server
from katapod.rpc.call_times import CallTimes
from katapod.rpc.pb import agent_pb2
from katapod.sandbox.bundle import read_bundle
from katapod.sandbox.container import Container
from katapod.sandbox.engine_bundle import carried_spec, container_plan, limits_of, sandbox_request, take_network
from katapod.sandbox.opening import open_sandbox
from katapod.sandbox.pod import Pod
from katapod.sandbox.task import follow, watch_oom
from katapod.shim.events import EventPublisher
from katapod.shim.execs import Execs
from katapod.shim.exits import HARMLESS, tell_exit
from katapod.shim.pb import events_pb2, task_pb2, types_pb2
from katapod.shim.processes import ExecProcess, TaskProcess
from katapod.shim.streams import IoUris, open_streams
from katapod.tasks import Background, beside, end_tasks, finish

__all__ = ["Tasks"]

log = logging.getLogger(__name__)

PAUSE_GRACE_S = 2.0  # of a pause container, between SIGTERM and SIGKILL
INPUT_READ_S = 10.0
LoadConfig = Callable[[str, Mapping[str, str]], Config]
CALLS = "kata_shim_rpc_durations_histogram_milliseconds"


class Tasks:
    """The tasks of one sandbox. Every method raises KatapodError."""

    def __init__(self, namespace: str, store: StateStore, load_config: LoadConfig, events: EventPublisher) -> None:
        """`load_config` takes the path that the engine has configured for this runtime, if any, and the sandbox's
        annotations."""
        self._namespace = namespace
        self._store = store
        self._load_config = load_config
        self._events = events
        self._tasks: dict[str, TaskProcess] = {}
        self._creating: dict[str, asyncio.Task[None]] = {}
        self._ending = False
        self._pod: Pod | None = None
        self._unfinished: Pod | None = None  # whose teardown was incomplete
        self._vmm_pid = 0
        self._pod_lock = asyncio.Lock()
        self.call_times = CallTimes(CALLS, "Latency of task calls, milliseconds.")
        self._background = Background()
        self._execs = Execs(namespace, events, self._background, lambda: self.pid)
        self._watch: set[asyncio.Task[None]] = set()
        self._closing: asyncio.Task[None] | None = None

    @property
    def pod(self) -> Pod | None:
        return self._pod

    @property
    def empty(self) -> bool:
        return not self._tasks and not self._creating

    @property
    def has_vm(self) -> bool:
        """Also while one is being started or ended."""
        return self._pod is not None or bool(self._creating) or self._is_closing

    @property
    def pid(self) -> int:
        """The pid of the VMM, which stands for every process in it, even after its end; our own pid before there is
        one."""
        return self._vmm_pid or os.getpid()

    def find(self, container_id: str) -> TaskProcess:
        if container_id not in self._tasks:
            raise NotFound(f"cannot find task {container_id}")
        return self._tasks[container_id]

    def find_process(self, container_id: str, exec_id: str) -> TaskProcess | ExecProcess:
        task = self.find(container_id)
        if not exec_id:
            return task
        if exec_id not in task.execs:
            raise NotFound(f"cannot find exec {exec_id} of task {container_id}")
        return task.execs[exec_id]

    # create

    async def create(
        self, container_id: str, bundle: Path, mounts: list[types_pb2.Mount], uris: IoUris, config_path: str
    ) -> None:
        """Raises what Pod.create_container and open_sandbox raise; nothing is left then."""
        if container_id in self._tasks or container_id in self._creating:
            raise AlreadyExists(f"cannot create task {container_id}: it already exists")
        if self._ending:
            raise _told_to_end(container_id)
        work = self._create(container_id, bundle, mounts, uris, config_path)
        async with beside(work, name=f"create-{container_id}") as task:
            self._creating[container_id] = task
            try:
                await task
            except asyncio.CancelledError:
                if self._ending:
                    raise _told_to_end(container_id) from None
                raise
            finally:
                del self._creating[container_id]

    async def _create(
        self, container_id: str, bundle: Path, mounts: list[types_pb2.Mount], uris: IoUris, config_path: str
    ) -> None:
        parse_container_name(container_id)
        spec, guarded = carried_spec(read_bundle(bundle))
        about = parse_annotations(spec.annotations, container_id)
        if guarded:
            log.warning("%s gets no devices of the host: set privileged_without_host_devices = true", container_id)
        if spec.process.terminal != uris.terminal:
            spec = replace(spec, process=replace(spec.process, terminal=uris.terminal))
        async with contextlib.AsyncExitStack() as undo:
            rootfs = bundle / "rootfs" if mounts else None
            if rootfs is not None:
                undo.callback(unmount_below, rootfs)
                rootfs.mkdir(mode=0o711, exist_ok=True)
                for mount in mounts:
                    mount_given(mount.type, mount.source, mount.options, rootfs)
            pod = await self._pod_for(container_id, spec, about, config_path, undo)
            plan = container_plan(container_id, spec, about, pod.config, bundle=bundle, own_rootfs=rootfs is not None)
            container = await pod.create_container(plan, limits_of(spec, about))
            undo.pop_all()
        self._tasks[container_id] = TaskProcess(container, uris, bundle, rootfs)
        io = events_pb2.TaskIO(stdin=uris.stdin, stdout=uris.stdout, stderr=uris.stderr, terminal=uris.terminal)
        self._events.publish(
            "/tasks/create",
            events_pb2.TaskCreate(container_id=container_id, bundle=str(bundle), rootfs=mounts, io=io, pid=self.pid),
        )

    async def _pod_for(
        self,
        container_id: str,
        spec: oci.Spec,
        about: PodAnnotations,
        config_path: str,
        undo: contextlib.AsyncExitStack,
    ) -> Pod:
        """The pod, started if this is its first container; that is undone if the container fails."""
        sandbox_id = about.sandbox_id
        async with self._pod_lock:
            if self._pod is None:
                if sandbox_id != container_id:
                    gone = self._tasks.get(sandbox_id)
                    cause = gone.cause() if gone is not None else ""
                    raise InvalidState(
                        f"cannot create {container_id}: its sandbox {sandbox_id} does not run here{cause}"
                    )
                request = sandbox_request(
                    sandbox_id,
                    spec,
                    about,
                    cgroups_path=spec.linux.cgroups_path,
                    labels=_labels_of(about, self._namespace),
                )
                config = self._load_config(config_path, spec.annotations)
                serve = partial(management_server, call_times=(self.call_times,))
                pod = self._pod = await open_sandbox(request, config, self._store, servers=(serve,))
                self._vmm_pid = pod.sandbox.vm.pid
                undo.push_async_callback(self.close_pod)
                self._watch = {
                    self._background.start(self._watch_death(pod), name="watch-death"),
                    self._background.start(watch_oom(pod.sandbox, pod.containers, self._tell_oom), name="watch-oom"),
                }
            elif sandbox_id != self._pod.sandbox.sandbox_id:
                raise InvalidState(
                    f"cannot create {container_id}: it belongs to sandbox {sandbox_id}, and this is "
                    f"{self._pod.sandbox.sandbox_id}"
                )
            return self._pod

    # start

    async def start(self, container_id: str) -> None:
        task = self.find(container_id)
        task.require(f"start task {container_id}", task_pb2.CREATED)
        if task.starting:
            raise InvalidState(f"cannot start task {container_id}: it is already being started")
        task.starting = True
        stack = contextlib.AsyncExitStack()
        try:
            task.open(await stack.enter_async_context(open_streams(task.uris, container_id, self._namespace)))
            if container_id == task.container.sandbox.sandbox_id:
                await take_network(task.container)
            await task.container.start()
        except BaseException as exc:
            await finish(stack.aclose(), name="close-streams")
            if isinstance(exc, KatapodError):  # engines delete only what has ended, and never start it again
                with contextlib.suppress(KatapodError):
                    await self._kill_created(task, signal.SIGKILL)
            task.starting = False
            raise
        task.status = task_pb2.RUNNING
        self._events.publish("/tasks/start", events_pb2.TaskStart(container_id=container_id, pid=self.pid))
        task.following = self._background.start(self._follow(task, stack), name=f"follow-{container_id}")
        await task.container.hooks.started(self.pid)

    async def _follow(self, task: TaskProcess, stack: contextlib.AsyncExitStack) -> None:
        """Wait for the end of a container's init process and of its streams; then report it."""
        container_id = task.container.container_id
        assert task.streams is not None
        status = KILLED_STATUS
        try:
            status = await follow(task.container, task.streams.stdin, task.streams.stdout, task.streams.stderr)
        except KatapodError as exc:
            log.error("task %s has ended: %s", container_id, exc)
        finally:
            try:
                await finish(stack.aclose(), name="close-streams")
            finally:  # whatever happens to the streams: engines wait for this
                tell_exit(self._events, task, container_id, container_id, status, self.pid)
        pod = self._pod
        if pod is not None and container_id == pod.sandbox.sandbox_id:
            self._close_soon()

    # exec

    def add_exec(self, container_id: str, exec_id: str, process: oci.Process, uris: IoUris) -> None:
        self._execs.add(self.find(container_id), exec_id, process, uris)

    async def start_exec(self, container_id: str, exec_id: str) -> None:
        process = self.find_process(container_id, exec_id)
        assert isinstance(process, ExecProcess)
        await self._execs.start(self.find(container_id), process)

    # operations on a process

    async def kill(self, container_id: str, exec_id: str, number: int, everyone: bool) -> None:
        """Signal 0 tests whether the process exists. Raises NotFound if it has ended."""
        process = self.find_process(container_id, exec_id)
        if process.status == task_pb2.STOPPED:
            if number and not self._events.connected:  # an error would make CRI-O's stop of the container fail
                return
            cause = self.find(container_id).cause()
            raise NotFound(f"cannot signal {exec_id or container_id}: process already finished{cause}")
        if isinstance(process, TaskProcess):
            if number == 0:
                return
            if process.status == task_pb2.CREATED and not process.starting and number not in HARMLESS:
                await self._kill_created(process, number)
                return
            await process.container.kill(number, everyone=everyone or number == signal.SIGKILL)
            if number == signal.SIGTERM and process.container.plan.holds_pid_namespace and process.insisting is None:
                process.insisting = self._background.start(self._insist(process), name=f"insist-{container_id}")
            return
        if process.guest is None:
            raise InvalidState(f"cannot signal exec {exec_id}: it has not started")
        if number:
            sandbox = self.find(container_id).container.sandbox
            await sandbox.guard(process.guest.signal(number))

    async def _insist(self, task: TaskProcess) -> None:
        """Kill a pause process that SIGTERM has not ended. It has nothing to clean up, and if it has not installed its
        handler yet, as when a pod is stopped right after its start, CRI-O would wait for three minutes."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PAUSE_GRACE_S):
                await task.exited.wait()
                return
        with contextlib.suppress(KatapodError):
            await task.container.kill(signal.SIGKILL, everyone=True)

    async def _kill_created(self, task: TaskProcess, number: int) -> None:
        """End a task that was never started: nothing waits for its process, and its program cannot handle the signal
        yet. Engines wait for its exit before they delete it."""
        try:
            await task.container.kill(signal.SIGKILL, everyone=True)
        finally:
            container_id = task.container.container_id
            tell_exit(self._events, task, container_id, container_id, 128 + number, self.pid)

    async def resize(self, container_id: str, exec_id: str, rows: int, columns: int) -> None:
        process = self.find_process(container_id, exec_id)
        if process.guest is None:
            assert isinstance(process, ExecProcess)
            size = oci.Box(height=rows, width=columns)
            process.process = replace(process.process, console_size=size)
            return
        await self.find(container_id).container.sandbox.guard(process.guest.resize(rows, columns))

    async def close_input(self, container_id: str, exec_id: str) -> None:
        process = self.find_process(container_id, exec_id)
        process.input_ended = True
        if process.streams is None:  # if it has not started
            return
        process.streams.end_input()
        await process.streams.wait_input_read(INPUT_READ_S)

    async def pause(self, container_id: str) -> None:
        task = self.find(container_id)
        task.require(f"pause task {container_id}", task_pb2.RUNNING)
        await task.container.pause()
        task.status = task_pb2.PAUSED
        self._events.publish("/tasks/paused", events_pb2.TaskPaused(container_id=container_id))

    async def resume(self, container_id: str) -> None:
        task = self.find(container_id)
        task.require(f"resume task {container_id}", task_pb2.PAUSED)
        await task.container.resume()
        task.status = task_pb2.RUNNING
        self._events.publish("/tasks/resumed", events_pb2.TaskResumed(container_id=container_id))

    async def update(self, container_id: str, resources: oci.Resources) -> None:
        """The sandbox is resized before the container's limits are raised."""
        task = self.find(container_id)
        if self._pod is None:
            raise InvalidState(f"cannot update task {container_id}: its sandbox has ended{task.cause()}")
        spec = task.container.plan.spec
        changed = replace(spec, linux=replace(spec.linux, resources=resources))
        about = parse_annotations(spec.annotations, container_id)
        if (limits := limits_of(changed, about)) is not None:
            await self._pod.resize_for(container_id, limits)
        await task.container.update(resources)

    async def processes(self, container_id: str) -> list[tuple[int, str]]:
        """(pid in the guest, id of its exec, or empty) of each process of a container."""
        return await self._execs.list_processes(self.find(container_id))

    async def stats(self, container_id: str) -> Any:
        """The agent's StatsContainerResponse."""
        task = self.find(container_id)
        sandbox = task.container.sandbox
        request = agent_pb2.StatsContainerRequest(container_id=container_id)
        return await sandbox.guard(sandbox.agent.call("StatsContainer", request))

    # delete

    async def delete(self, container_id: str, exec_id: str) -> TaskProcess | ExecProcess:
        process = self.find_process(container_id, exec_id)
        process.require(f"delete {exec_id or container_id}", task_pb2.STOPPED, task_pb2.CREATED)
        if isinstance(process, ExecProcess):
            await self._execs.delete(self.find(container_id), process)
            return process
        async with process.deleting:
            if self.find(container_id) is not process:
                raise NotFound(f"cannot find task {container_id}")
            await self._remove(container_id, process)
        return process

    async def _remove(self, container_id: str, process: TaskProcess) -> None:
        process.mark_exited(0)
        pod = self._pod
        if (pod is not None and container_id == pod.sandbox.sandbox_id) or self._is_closing or self._unfinished:
            await self.close_pod()
        elif pod is not None and container_id in pod.containers:
            await pod.remove_container(container_id)
        if process.rootfs is not None:
            unmount_below(process.rootfs)
        await process.container.hooks.stopped()
        for left in process.execs.values():
            left.mark_exited(0)
        del self._tasks[container_id]
        event = events_pb2.TaskDelete(container_id=container_id, pid=self.pid, exit_status=process.exit_status)
        event.exited_at.seconds, event.exited_at.nanos = divmod(process.exited_ns, 10**9)
        self._events.publish("/tasks/delete", event)

    # end of the pod

    async def end(self) -> None:
        """Cancel what is being created, then end the pod, and all tasks: with a guest that hangs a start takes long."""
        self._ending = True
        await end_tasks(self._creating.values())
        await self._close_alone()
        await self._background.close()

    @property
    def _is_closing(self) -> bool:
        return self._closing is not None and not self._closing.done()

    def _close_soon(self) -> None:
        if not self._is_closing:
            self._closing = self._background.start(self._close_alone(), name="close-pod")

    async def _close_alone(self) -> None:
        """Like close_pod, where there is no caller to report errors to."""
        try:
            await self.close_pod()
        except KatapodError as exc:
            log.error("%s", exc)

    async def close_pod(self) -> None:
        """End the VM and report the exits of what was still running in it. Idempotent; after a failure the next call
        continues with what is left. Raises KatapodError."""
        async with self._pod_lock:
            if self._unfinished is not None:
                await self._unfinished.close()
                self._unfinished = None
            pod = self._pod
            if pod is None:
                return
            try:
                await end_tasks(self._watch)
                # the end of the VM kills what still runs; the tasks that wait for it report the exits
                await pod.close()
            except BaseException:
                self._unfinished = pod
                raise
            finally:
                await self._tell_ends()
                self._pod = None

    async def _tell_ends(self) -> None:
        """Wait until the exits of all tasks are reported, after their VM has ended."""
        for container_id, task in list(self._tasks.items()):  # they may be deleted meanwhile
            following = [process.following for process in (task, *task.execs.values()) if process.following]
            if following:
                await asyncio.wait(following, timeout=INPUT_READ_S)
            if not task.started:
                tell_exit(self._events, task, container_id, container_id, KILLED_STATUS, self.pid)
            log.debug("task %s: %d followers", container_id, len(following))

    async def _watch_death(self, pod: Pod) -> None:
        error = await asyncio.shield(pod.sandbox.death)
        log.error("sandbox %s has died: %s", pod.sandbox.sandbox_id, error)
        self._close_soon()

    def _tell_oom(self, container: Container) -> None:
        """CRI-O looks for a file in the bundle, containerd for the event."""
        task = self._tasks.get(container.container_id)
        if task is None:
            return
        with contextlib.suppress(OSError):
            (task.bundle / "oom").touch()
        self._events.publish("/tasks/oom", events_pb2.TaskOOM(container_id=container.container_id))


def _told_to_end(container_id: str) -> InvalidState:
    return InvalidState(f"cannot create task {container_id}: its shim is shutting down")


def _labels_of(about: PodAnnotations, namespace: str) -> dict[str, str]:
    found = {
        "containerd.namespace": namespace,
        "io.kubernetes.pod.name": about.pod_name,
        "io.kubernetes.pod.namespace": about.pod_namespace,
        "io.kubernetes.pod.uid": about.pod_uid,
    }
    return {key: value for key, value in found.items() if value}
