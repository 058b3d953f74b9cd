"""What is on record about sandboxes and containers, as values: from disk alone, whoever holds them."""

from msgspec import Struct, field

from katapod.model.errors import NotFound
from katapod.model.record import ContainerRecord, SandboxRecord, State

__all__ = ["ContainerInfo", "SandboxInfo", "container_info", "sandbox_info"]


class ContainerInfo(Struct, frozen=True):
    """Times are seconds since the epoch, 0 for what has not happened. `exit_code`: None while it runs. `error`: why it
    ended, if not by itself."""

    id: str
    image: str
    command: tuple[str, ...]
    state: State
    started_at: float
    finished_at: float
    exit_code: int | None
    oom_killed: bool
    error: str


class SandboxInfo(Struct, frozen=True):
    """`lost`: its supervisor was killed, and the rest says what was true then. `pod`: a container engine made it for
    the containers of a pod. `memory_mib`: of the VM. `supervisor_pid`, `vmm_pid`: 0 for a process that has ended.
    """

    id: str
    state: State
    lost: bool
    pod: bool
    created_at: float
    vcpus: int
    memory_mib: int
    accelerator: str
    supervisor_pid: int
    vmm_pid: int
    network: str
    addresses: tuple[str, ...]
    ports: tuple[str, ...]
    error: str
    labels: dict[str, str] = field(default_factory=dict)
    containers: tuple[ContainerInfo, ...] = ()


def container_info(record: SandboxRecord, container_id: str) -> ContainerInfo:
    """Raises NotFound."""
    for item in record.containers:
        if item.container_id == container_id:
            return _container(item)
    raise NotFound(f"cannot find container {container_id} in sandbox {record.sandbox_id}")


def _container(record: ContainerRecord) -> ContainerInfo:
    return ContainerInfo(
        id=record.container_id,
        image=record.image,
        command=record.command,
        state=record.state,
        started_at=record.started_at,
        finished_at=record.finished_at,
        exit_code=record.exit_code,
        oom_killed=record.oom_killed,
        error=record.error,
    )


def sandbox_info(record: SandboxRecord, *, lost: bool = False) -> SandboxInfo:
    network = record.attachment
    return SandboxInfo(
        id=record.sandbox_id,
        state=record.shown_state,
        lost=lost,
        pod=record.pod,
        created_at=record.created_at,
        vcpus=record.vcpus,
        memory_mib=record.mem_mib,
        accelerator=record.accelerator,
        supervisor_pid=record.supervisor_pid,
        vmm_pid=record.vmm_pid,
        network=network.config.name if network is not None else "none",
        addresses=tuple(str(address) for address in network.addresses) if network is not None else (),
        ports=tuple(str(port) for port in network.ports) if network is not None else (),
        error=record.error,
        labels=record.labels,
        containers=tuple(_container(item) for item in record.containers),
    )
