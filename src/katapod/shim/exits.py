"""What ends a process, and how its end is reported to containerd: once, when its streams are drained."""

import signal

from katapod.shim.events import EventPublisher
from katapod.shim.pb import events_pb2
from katapod.shim.processes import ExecProcess, TaskProcess

__all__ = ["HARMLESS", "tell_exit"]

HARMLESS = frozenset(
    {signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH}
    | {signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}
)
"""Signals whose default action does not end a process. Source: signal(7)."""


def tell_exit(
    events: EventPublisher,
    process: TaskProcess | ExecProcess,
    container_id: str,
    process_id: str,
    status: int,
    vmm_pid: int,
) -> None:
    if process.exited.is_set():
        return
    process.mark_exited(status)
    event = events_pb2.TaskExit(container_id=container_id, id=process_id, pid=vmm_pid, exit_status=status)
    event.exited_at.seconds, event.exited_at.nanos = divmod(process.exited_ns, 10**9)
    events.publish("/tasks/exit", event)
