"""What is on disk about a sandbox. The supervisor writes it; every command reads it."""

from enum import Enum

import msgspec

from katapod.model.attachment import AttachmentRecord
from katapod.model.devices import DeviceTable
from katapod.model.exit_status import KILLED_STATUS
from katapod.model.network import NetworkRecord

__all__ = [
    "DEFAULT_STOP_TIMEOUT_S",
    "ContainerRecord",
    "SandboxRecord",
    "State",
    "killed_containers",
]

DEFAULT_STOP_TIMEOUT_S = 10
"""Docker's and Podman's."""


class State(Enum):
    """OCI's names, seen from outside."""

    CREATING = "creating"
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"


class ContainerRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    container_id: str
    image: str
    command: tuple[str, ...]
    state: State = State.CREATING
    terminal: bool = False
    user: str = ""  # USER[:GROUP] as given, for exec too; empty: the spec has numbers
    groups: tuple[str, ...] = ()  # further ones of that user
    image_digest: str = ""  # held in the image store while the container exists
    stop_signal: int = 15
    stop_timeout_s: int | None = DEFAULT_STOP_TIMEOUT_S  # from that signal to SIGKILL; None: SIGKILL never comes
    volumes: tuple[str, ...] = ()  # names of those of the store that it has
    started_at: float = 0.0  # seconds since the epoch
    finished_at: float = 0.0
    exit_code: int | None = None
    oom_killed: bool = False
    error: str = ""


def killed_containers(
    containers: tuple[ContainerRecord, ...], error: str, finished_at: float
) -> tuple[ContainerRecord, ...]:
    """They as they are when their VM has ended: those that had not stopped were killed, for the reason `error`."""
    return tuple(
        item
        if item.state is State.STOPPED
        else msgspec.structs.replace(
            item, state=State.STOPPED, error=error, exit_code=KILLED_STATUS, finished_at=finished_at
        )
        for item in containers
    )


class SandboxRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One sandbox. Everything it acquires lies in its own directories, in the network namespace that `network`
    names, or dies with its supervisor, so this record and the directories named by its ids are all that a fresh process
    needs to remove it."""

    sandbox_id: str
    created_at: float
    supervisor_pid: int
    boot_id: str
    auto_remove: bool = False
    lasting: bool = False  # it stays though its container has not run: it was made by `create`, or is started again
    restart: str = "no"  # the restart policy: no, always, unless-stopped, on-failure, on-failure:N
    restarts: int = 0  # by that policy, since somebody has started it
    restart_at: float = 0.0  # when its supervisor, which waits, starts it again, in seconds since the epoch
    stop_asked: bool = False  # somebody has asked for its end, so that no policy starts it again
    state: State = State.CREATING
    accelerator: str = ""
    kernel: str = ""
    vcpus: int = 0
    mem_mib: int = 0  # memory size of the guest now: boot memory and plugged DIMMs
    vmm_pid: int = 0
    machine_id: str = ""  # names the machine's directories if it came from the pool; empty: sandbox_id does
    pod: bool = False  # made by a container engine for several containers; its own id is that of the pause container
    pooled: bool = False  # a machine that is kept ready: nobody's sandbox yet
    template: str = ""  # the key of the template it was cloned from; empty: it booted
    attachment: AttachmentRecord | None = None  # to a network; kept until it is undone
    network: NetworkRecord | None = None  # what was made in the pod's network namespace
    devices: DeviceTable = DeviceTable()  # of the VM, and where it has them; on disk in a file of its own
    error: str = ""  # why it ended, or what of the host failed it
    log_error: str = ""  # why the container's log is not complete
    cgroups: tuple[str, ...] = ()  # directories of the host's cgroup hierarchies, in the order of removal
    containers: tuple[ContainerRecord, ...] = ()
    labels: dict[str, str] = {}
    version: int = 1

    @property
    def at_rest(self) -> bool:
        """Whether it is on record alone: its container has ended, or was not started yet."""
        return self.state in (State.STOPPED, State.CREATED)

    @property
    def is_over(self) -> bool:
        """Whether nothing runs in it any more, as people see it. What it had on the host may still be on its way out.
        A pod outlives its containers: it is its engine that ends it."""
        ended = bool(self.containers) and all(item.state is State.STOPPED for item in self.containers)
        return self.state is State.STOPPED or (ended and not self.pod)

    @property
    def shown_state(self) -> State:
        """As people see it: stopped with its container; paused, if all its containers that have not ended are. The
        pause container of a pod, which engines do not pause, does not count beside others."""
        if self.is_over:
            return State.STOPPED
        alive = [item for item in self.containers if item.state is not State.STOPPED]
        alive = [item for item in alive if item.container_id != self.sandbox_id] or alive
        is_paused = bool(alive) and all(item.state is State.PAUSED for item in alive)
        return State.PAUSED if self.state is State.RUNNING and is_paused else self.state
