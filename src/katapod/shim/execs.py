"""The execs of a sandbox's tasks: further processes in running containers, from Exec to Delete."""

import asyncio
import contextlib
import logging
from collections.abc import Callable

from msgspec.structs import replace

from katapod.model import oci
from katapod.model.errors import AlreadyExists, InvalidState, KatapodError, UsageError
from katapod.model.exit_status import KILLED_STATUS
from katapod.plan.guest_spec import process_for_guest
from katapod.rpc.oci_message import process_to_message
from katapod.rpc.status import StatusCode
from katapod.sandbox.client import start_exec
from katapod.sandbox.errors import AgentFailed
from katapod.sandbox.stdio import GuestProcess, carry
from katapod.shim.events import EventPublisher
from katapod.shim.exits import tell_exit
from katapod.shim.pb import events_pb2, task_pb2
from katapod.shim.processes import ExecProcess, TaskProcess
from katapod.shim.streams import IoUris, open_streams
from katapod.tasks import Background, finish

__all__ = ["Execs"]

log = logging.getLogger(__name__)

EXEC_DRAIN_S = 2.0  # as in containerd's shim for runc


class Execs:
    """Every method raises KatapodError. `vmm_pid` tells which process stands for all that run in the VM."""

    def __init__(
        self, namespace: str, events: EventPublisher, background: Background, vmm_pid: Callable[[], int]
    ) -> None:
        self._namespace = namespace
        self._events = events
        self._background = background
        self._vmm_pid = vmm_pid

    def add(self, task: TaskProcess, exec_id: str, process: oci.Process, uris: IoUris) -> None:
        container_id = task.container.container_id
        if not exec_id:
            raise UsageError(f"cannot add an exec to task {container_id}: it has no id")
        if exec_id in task.execs or exec_id == container_id:
            raise AlreadyExists(f"cannot add exec {exec_id} to task {container_id}: it already exists")
        task.require(f"exec in task {container_id}", task_pb2.RUNNING)
        task.execs[exec_id] = ExecProcess(exec_id, replace(process, terminal=uris.terminal), uris)
        self._events.publish("/tasks/exec-added", events_pb2.TaskExecAdded(container_id=container_id, exec_id=exec_id))

    async def start(self, task: TaskProcess, process: ExecProcess) -> None:
        container_id, exec_id = task.container.container_id, process.exec_id
        process.require(f"start exec {exec_id}", task_pb2.CREATED)
        if process.starting:
            raise InvalidState(f"cannot start exec {exec_id}: it is already being started")
        process.starting = True
        sandbox = task.container.sandbox
        stack = contextlib.AsyncExitStack()
        try:
            process.open(await stack.enter_async_context(open_streams(process.uris, container_id, self._namespace)))
            message = process_to_message(process_for_guest(process.process))
            process.guest = await sandbox.guard(start_exec(sandbox.agent, container_id, message, user=""))
        except BaseException:
            await finish(stack.aclose(), name="close-streams")
            process.mark_exited(KILLED_STATUS)
            raise
        process.status = task_pb2.RUNNING
        self._events.publish(
            "/tasks/exec-started",
            events_pb2.TaskExecStarted(container_id=container_id, exec_id=exec_id, pid=self._vmm_pid()),
        )
        process.following = self._background.start(
            self._follow(task, process, process.guest, stack), name=f"follow-{exec_id}"
        )

    async def _follow(
        self, task: TaskProcess, process: ExecProcess, guest: GuestProcess, stack: contextlib.AsyncExitStack
    ) -> None:
        assert process.streams is not None
        streams, status = process.streams, KILLED_STATUS
        container_id, sandbox = task.container.container_id, task.container.sandbox

        async def on_exit(status: int) -> None:
            await streams.wait_output_read()
            tell_exit(self._events, process, container_id, process.exec_id, status, self._vmm_pid())

        try:
            status = await sandbox.guard(carry(guest, streams.stdin, streams.stdout, streams.stderr, on_exit))
        except KatapodError as exc:
            log.error("exec %s has ended: %s", process.exec_id, exc)
        finally:
            try:
                await finish(stack.aclose(), name="close-streams")
            finally:
                tell_exit(self._events, process, container_id, process.exec_id, status, self._vmm_pid())

    async def delete(self, task: TaskProcess, process: ExecProcess) -> None:
        process.mark_exited(0)  # Wait on an exec that never started returns at once
        del task.execs[process.exec_id]
        if process.following is not None:  # output of its background processes is forwarded until a while later
            await asyncio.wait({process.following}, timeout=EXEC_DRAIN_S)
            process.following.cancel()
            await asyncio.wait({process.following})

    async def list_processes(self, task: TaskProcess) -> list[tuple[int, str]]:
        """The processes of a container: (pid in the guest, id of its exec, or empty). With upstream's agent, which
        cannot list them, the VMM stands for all."""
        if task.status == task_pb2.STOPPED:
            return []
        execs = {process.guest.exec_id: name for name, process in task.execs.items() if process.guest is not None}
        sandbox = task.container.sandbox
        try:
            found = await sandbox.guard(sandbox.agent.processes(task.container.container_id))
        except AgentFailed as exc:
            if exc.context.get("code") is not StatusCode.UNIMPLEMENTED:
                raise
            return [(self._vmm_pid(), "")]
        return [(pid, execs.get(exec_id, "")) for pid, exec_id in found]
