"""Use of resources: cgroup v2 files into the protocol's message, which has cgroup v1's shape; /proc into
Prometheus text; file system sizes. Parsing is apart from reading."""

from __future__ import annotations

import os

from katapod.agent.containers import find_container
from katapod.rpc.pb import agent_pb2, csi_pb2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from katapod.agent.sandbox import Agent

__all__ = ["parse_io_stat", "parse_keyed", "stats_container"]

UNLIMITED = 0xFFFFFFFFFFFFFFFF
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")


def _read(path: str) -> str:
    """The file's text; empty if the kernel has no such file (a controller that is off)."""
    try:
        with open(path) as handle:
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


def _fill_memory(stats: agent_pb2.MemoryStats, folder: str) -> None:
    details = parse_keyed(_read(f"{folder}/memory.stat"))
    events = parse_keyed(_read(f"{folder}/memory.events"))
    stats.cache = details.get("file", 0)
    stats.use_hierarchy = True
    stats.usage.usage = _number(_read(f"{folder}/memory.current"))
    stats.usage.max_usage = _number(_read(f"{folder}/memory.peak"))
    stats.usage.failcnt = events.get("max", 0)
    stats.usage.limit = _number(_read(f"{folder}/memory.max"))
    stats.swap_usage.usage = _number(_read(f"{folder}/memory.swap.current"))
    stats.swap_usage.limit = _number(_read(f"{folder}/memory.swap.max"))
    stats.kernel_usage.usage = details.get("kernel", 0)
    for key, value in details.items():
        stats.stats[key] = value


def _fill_cpu(stats: agent_pb2.CpuStats, folder: str) -> None:
    values = parse_keyed(_read(f"{folder}/cpu.stat"))
    stats.cpu_usage.total_usage = values.get("usage_usec", 0) * 1000
    stats.cpu_usage.usage_in_usermode = values.get("user_usec", 0) * 1000
    stats.cpu_usage.usage_in_kernelmode = values.get("system_usec", 0) * 1000
    stats.throttling_data.periods = values.get("nr_periods", 0)
    stats.throttling_data.throttled_periods = values.get("nr_throttled", 0)
    stats.throttling_data.throttled_time = values.get("throttled_usec", 0) * 1000


def _fill_io(stats: agent_pb2.BlkioStats, folder: str) -> None:
    for major, minor, counters in parse_io_stat(_read(f"{folder}/io.stat")):
        for operation, size, count in (("Read", "rbytes", "rios"), ("Write", "wbytes", "wios")):
            stats.io_service_bytes_recursive.add(major=major, minor=minor, op=operation, value=counters.get(size, 0))
            stats.io_serviced_recursive.add(major=major, minor=minor, op=operation, value=counters.get(count, 0))


def _fill_network(response: agent_pb2.StatsContainerResponse) -> None:
    """The guest's interfaces: containers share its network namespace."""
    for name, values in _interfaces().items():
        response.network_stats.add(
            name=name,
            rx_bytes=values[0], rx_packets=values[1], rx_errors=values[2], rx_dropped=values[3],
            tx_bytes=values[8], tx_packets=values[9], tx_errors=values[10], tx_dropped=values[11],
        )  # fmt: skip


def _interfaces() -> dict[str, list[int]]:
    found = {}
    for line in _read("/proc/net/dev").splitlines()[2:]:
        name, _, rest = line.partition(":")
        found[name.strip()] = [int(value) for value in rest.split()]
    return found


async def stats_container(agent: Agent, request: agent_pb2.StatsContainerRequest) -> agent_pb2.StatsContainerResponse:
    folder = find_container(agent, request.container_id).cgroup_folder
    response = agent_pb2.StatsContainerResponse()
    stats = response.cgroup_stats
    _fill_cpu(stats.cpu_stats, folder)
    _fill_memory(stats.memory_stats, folder)
    stats.pids_stats.current = _number(_read(f"{folder}/pids.current"))
    limit = _number(_read(f"{folder}/pids.max"))
    stats.pids_stats.limit = 0 if limit == UNLIMITED else limit
    _fill_io(stats.blkio_stats, folder)
    for name in _entries(folder):
        if name.startswith("hugetlb.") and name.endswith(".current"):
            size = name.split(".")[1]
            stats.hugetlb_stats[size].usage = _number(_read(f"{folder}/{name}"))
            events = parse_keyed(_read(f"{folder}/hugetlb.{size}.events"))
            stats.hugetlb_stats[size].failcnt = events.get("max", 0)
    _fill_network(response)
    return response


def _entries(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


async def get_metrics(agent: Agent, request: agent_pb2.GetMetricsRequest) -> agent_pb2.Metrics:
    """Prometheus text. Source of the names: facts metrics.md."""
    agent.scrapes += 1
    pages = _read("/proc/self/statm").split()
    fields = _read("/proc/self/stat").rpartition(")")[2].split()  # from field 3, "state", on
    load = _read("/proc/loadavg").split()
    running, _, existing = load[3].partition("/")
    lines: list[str] = []

    def family(name: str, kind: str, rows: list[tuple[str, float]]) -> None:
        lines.append(f"# TYPE {name} {kind}")
        lines.extend(f"{name}{labels} {value:.15g}" for labels, value in rows)

    family("kata_agent_scrape_count", "counter", [("", agent.scrapes)])
    family("kata_agent_threads", "gauge", [("", int(fields[17]))])
    family("kata_agent_total_time", "gauge", [("", (int(fields[11]) + int(fields[12])) / CLOCK_TICKS)])
    family("kata_agent_total_vm", "gauge", [("", int(pages[0]) * PAGE_SIZE)])
    family("kata_agent_total_rss", "gauge", [("", int(pages[1]) * PAGE_SIZE)])
    family("kata_guest_load", "gauge", [(f'{{item="load{m}"}}', float(load[i])) for i, m in enumerate((1, 5, 15))])
    family("kata_guest_tasks", "gauge", [('{item="cur"}', int(running)), ('{item="max"}', int(existing))])
    family("kata_guest_meminfo", "gauge", _meminfo_rows())
    family(
        "kata_guest_vm_stat",
        "gauge",
        [(f'{{item="{key}"}}', value) for key, value in parse_keyed(_read("/proc/vmstat")).items()],
    )
    family("kata_guest_cpu_time", "gauge", _cpu_rows())
    family("kata_guest_netdev_stat", "gauge", _netdev_rows())
    return agent_pb2.Metrics(metrics="\n".join(lines) + "\n")


def _meminfo_rows() -> list[tuple[str, float]]:
    rows = []
    for line in _read("/proc/meminfo").splitlines():
        key, _, rest = line.partition(":")
        value, _, unit = rest.strip().partition(" ")
        name = key.lower().replace("(", "_").replace(")", "")
        rows.append((f'{{item="{name}"}}', float(int(value) * (1024 if unit == "kB" else 1))))
    return rows


def _cpu_rows() -> list[tuple[str, float]]:
    items = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal", "guest", "guest_nice")
    rows = []
    for line in _read("/proc/stat").splitlines():
        name, *values = line.split()
        if name.startswith("cpu"):
            label = name[3:] or "total"
            rows += [
                (f'{{cpu="{label}",item="{item}"}}', int(value) / CLOCK_TICKS)
                for item, value in zip(items, values, strict=False)
            ]
    return rows


def _netdev_rows() -> list[tuple[str, float]]:
    items = {0: "recv_bytes", 1: "recv_packets", 2: "recv_errs", 3: "recv_drop"} | {
        8: "sent_bytes", 9: "sent_packets", 10: "sent_errs", 11: "sent_drop",
    }  # fmt: skip
    return [
        (f'{{interface="{name}",item="{item}"}}', float(values[index]))
        for name, values in _interfaces().items()
        for index, item in items.items()
    ]


async def get_volume_stats(agent: Agent, request: agent_pb2.VolumeStatsRequest) -> csi_pb2.VolumeStatsResponse:
    """Raises OSError for a path that is not there."""
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
