"""Observations of a running sandbox: what its host processes take, and how much of it is the containers' own."""

import asyncio
import time

from katapod.host.state import StateStore
from katapod.model.errors import InvalidState, KatapodError
from katapod.model.overhead import MemoryParts, Observation
from katapod.model.record import SandboxRecord
from katapod.observe.memory_use import cpu_seconds, family, memory_parts, read_processes
from katapod.rpc.agent import AgentClient
from katapod.rpc.pb import agent_pb2
from katapod.rpc.status import RpcError
from katapod.sandbox.client import connect_control

__all__ = ["ContainerUse", "container_use", "memory_of", "observe"]

STATS_LIMIT_S = 10.0


class ContainerUse:
    """What the guest charges to containers: memory in bytes, CPU in nanoseconds, processes."""

    def __init__(self, stats: list[agent_pb2.StatsContainerResponse]) -> None:
        groups = [each.cgroup_stats for each in stats]
        self.memory_bytes = sum(group.memory_stats.usage.usage for group in groups)
        self.cpu_ns = sum(group.cpu_stats.cpu_usage.total_usage for group in groups)
        self.pids = sum(group.pids_stats.current for group in groups)


def memory_of(record: SandboxRecord) -> MemoryParts:
    """The host memory of a sandbox now; of what has ended, nothing."""
    found = read_processes(_processes(record), record.vmm_pid)
    return memory_parts(found, emulated=record.accelerator == "tcg")


async def observe(store: StateStore, name: str, phase: str, seconds: float) -> Observation:
    """Watch a running sandbox for `seconds`. Raises NotFound, InvalidState if it does not run, KatapodError."""
    async with connect_control(store, name) as client:
        record = client.record
        before, host_before, began = await container_use(client.agent, record), _cpu_of(record), time.monotonic()
        await asyncio.sleep(seconds)
        after, host_after, took_s = await container_use(client.agent, record), _cpu_of(record), time.monotonic() - began
        memory = memory_of(record)
    if not memory.guest_kib:
        raise InvalidState(f"cannot measure {name}: it ended meanwhile")
    return Observation(
        phase=phase,
        memory=memory,
        containers_kib=after.memory_bytes // 1024,
        cpu_s=host_after - host_before,
        containers_cpu_s=(after.cpu_ns - before.cpu_ns) / 1e9,
        seconds=took_s,
    )


async def container_use(agent: AgentClient, record: SandboxRecord) -> ContainerUse:
    """Raises KatapodError."""
    stats = []
    for container in record.containers:
        request = agent_pb2.StatsContainerRequest(container_id=container.container_id)
        try:
            stats.append(await agent.call("StatsContainer", request, timeout_s=STATS_LIMIT_S))
        except RpcError as exc:
            raise KatapodError(f"cannot read the statistics of {container.container_id}: {exc.message}") from exc
    return ContainerUse(stats)


def _processes(record: SandboxRecord) -> list[int]:
    return family(pid for pid in (record.supervisor_pid, record.vmm_pid) if pid)


def _cpu_of(record: SandboxRecord) -> float:
    return cpu_seconds(_processes(record), with_ended=True)
