"""Resource usage: cgroup v2 files as the protocol's message, which has the format of cgroup v1; file system sizes.
Parsing is separate from reading."""

from __future__ import annotations

import os

from katapod.agent.containers import find_container
from katapod.rpc.pb import agent_pb2, csi_pb2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from katapod.agent.sandbox import Agent
    from katapod.rpc.pb import katapod_pb2

__all__ = ["interfaces", "list_processes", "parse_io_stat", "parse_keyed", "read_text", "stats_container"]

UNLIMITED = 0xFFFFFFFFFFFFFFFF
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")


def read_text(path: str) -> str:
    """The file's content; empty if there is no such file (a controller is disabled)."""
    try:
        with open(path, errors="replace") as handle:
            return handle.read()
    except OSError:
        return ""


def _number(text: str) -> int:
    """A cgroup's single value: "max" is no limit, an absent file is 0."""
    text = text.strip()
    return UNLIMITED if text == "max" else int(text or 0)


def parse_keyed(text: str) -> dict[str, int]:
    """ "key value" lines."""
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def parse_io_stat(text: str) -> list[tuple[int, int, dict[str, int]]]:
    """io.stat: (major, minor, counters) of each device."""
    found = []
    for line in text.splitlines():
        device, *fields = line.split()
        major, _, minor = device.partition(":")
        pairs = (field.partition("=") for field in fields)
        found.append((int(major), int(minor), {key: int(value) for key, _, value in pairs if value.isdigit()}))
    return found


def _fill_memory(stats: agent_pb2.MemoryStats, directory: str) -> None:
    details = parse_keyed(read_text(f"{directory}/memory.stat"))
    events = parse_keyed(read_text(f"{directory}/memory.events"))
    stats.cache = details.get("file", 0)
    stats.use_hierarchy = True
    stats.usage.usage = _number(read_text(f"{directory}/memory.current"))
    stats.usage.max_usage = _number(read_text(f"{directory}/memory.peak"))
    stats.usage.failcnt = events.get("max", 0)
    stats.usage.limit = _number(read_text(f"{directory}/memory.max"))
    stats.swap_usage.usage = _number(read_text(f"{directory}/memory.swap.current"))
    stats.swap_usage.limit = _number(read_text(f"{directory}/memory.swap.max"))
    stats.swap_usage.max_usage = _number(read_text(f"{directory}/memory.swap.peak"))
    stats.swap_usage.failcnt = parse_keyed(read_text(f"{directory}/memory.swap.events")).get("max", 0)
    stats.kernel_usage.usage = details.get("kernel", 0)
    for key, value in details.items():
        stats.stats[key] = value
    for key, value in events.items():
        stats.events[key] = value


def _fill_cpu(stats: agent_pb2.CpuStats, directory: str) -> None:
    values = parse_keyed(read_text(f"{directory}/cpu.stat"))
    stats.cpu_usage.total_usage = values.get("usage_usec", 0) * 1000
    stats.cpu_usage.usage_in_usermode = values.get("user_usec", 0) * 1000
    stats.cpu_usage.usage_in_kernelmode = values.get("system_usec", 0) * 1000
    stats.throttling_data.periods = values.get("nr_periods", 0)
    stats.throttling_data.throttled_periods = values.get("nr_throttled", 0)
    stats.throttling_data.throttled_time = values.get("throttled_usec", 0) * 1000


def _fill_io(stats: agent_pb2.BlkioStats, directory: str) -> None:
    for major, minor, counters in parse_io_stat(read_text(f"{directory}/io.stat")):
        for operation, size, count in (("Read", "rbytes", "rios"), ("Write", "wbytes", "wios")):
            stats.io_service_bytes_recursive.add(major=major, minor=minor, op=operation, value=counters.get(size, 0))
            stats.io_serviced_recursive.add(major=major, minor=minor, op=operation, value=counters.get(count, 0))


def _fill_network(response: agent_pb2.StatsContainerResponse) -> None:
    """Those of the guest: containers share its network namespace."""
    for name, values in interfaces().items():
        response.network_stats.add(
            name=name,
            rx_bytes=values[0], rx_packets=values[1], rx_errors=values[2], rx_dropped=values[3],
            tx_bytes=values[8], tx_packets=values[9], tx_errors=values[10], tx_dropped=values[11],
        )  # fmt: skip


def interfaces() -> dict[str, list[int]]:
    found = {}
    for line in read_text("/proc/net/dev").splitlines()[2:]:
        name, _, rest = line.partition(":")
        found[name.strip()] = [int(value) for value in rest.split()]
    return found


async def stats_container(agent: Agent, request: agent_pb2.StatsContainerRequest) -> agent_pb2.StatsContainerResponse:
    directory = find_container(agent, request.container_id).cgroup_directory
    response = agent_pb2.StatsContainerResponse()
    stats = response.cgroup_stats
    _fill_cpu(stats.cpu_stats, directory)
    _fill_memory(stats.memory_stats, directory)
    stats.pids_stats.current = _number(read_text(f"{directory}/pids.current"))
    limit = _number(read_text(f"{directory}/pids.max"))
    stats.pids_stats.limit = 0 if limit == UNLIMITED else limit
    _fill_io(stats.blkio_stats, directory)
    for name in _entries(directory):
        if name.startswith("hugetlb.") and name.endswith(".current"):
            size = name.split(".")[1]
            stats.hugetlb_stats[size].usage = _number(read_text(f"{directory}/{name}"))
            stats.hugetlb_stats[size].limit = _number(read_text(f"{directory}/hugetlb.{size}.max"))
            events = parse_keyed(read_text(f"{directory}/hugetlb.{size}.events"))
            stats.hugetlb_stats[size].failcnt = events.get("max", 0)
    _fill_network(response)
    return response


def _entries(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []


async def list_processes(agent: Agent, request: katapod_pb2.ProcessesRequest) -> katapod_pb2.ProcessesResponse:
    """All processes in the cgroup of a container and below. Source: cgroups(7), cgroup.procs."""
    from katapod.rpc.pb import katapod_pb2

    container = find_container(agent, request.container_id)
    execs = {process.pid: process.exec_id for process in container.processes.values() if not process.ended.done}
    execs.pop(container.init_pid, None)
    pids: set[int] = set()
    for directory, _, _ in os.walk(container.cgroup_directory):
        pids.update(int(pid) for pid in read_text(f"{directory}/cgroup.procs").split())
    response = katapod_pb2.ProcessesResponse()
    for pid in sorted(pids):
        response.processes.add(pid=pid, exec_id=execs.get(pid, ""))
    return response


async def get_volume_stats(agent: Agent, request: agent_pb2.VolumeStatsRequest) -> csi_pb2.VolumeStatsResponse:
    """Raises OSError if the path does not exist."""
    data = os.statvfs(request.volume_guest_path)
    response = csi_pb2.VolumeStatsResponse()
    response.usage.add(
        available=data.f_bavail * data.f_frsize,
        total=data.f_blocks * data.f_frsize,
        used=(data.f_blocks - data.f_bfree) * data.f_frsize,
        unit=csi_pb2.VolumeUsage.BYTES,
    )
    response.usage.add(
        available=data.f_favail,
        total=data.f_files,
        used=data.f_files - data.f_ffree,
        unit=csi_pb2.VolumeUsage.INODES,
    )
    response.volume_condition.abnormal = False
    return response
