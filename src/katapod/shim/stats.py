"""The resource usage of a container: the agent's response as the message that containerd and the kubelet read. Pure.

The agent responds in the format of cgroup v1, with memory.stat as its kernel has it: v2's in our guests, v1's in
others. containerd expects the format of the host's cgroup version. CRI-O reads parts of a response without checking
that they are present, so all are, except for those that depend on the kernel: pressure, and the counts of cgroup v1's
taskstats. Source: the metrics messages of containerd/cgroups; cgroups(7).
"""

from collections.abc import Mapping
from typing import Any

from katapod.rpc.pb import agent_pb2
from katapod.shim.pb import metrics_v1_pb2, metrics_v2_pb2

__all__ = ["METRICS_V1_URL", "METRICS_V2_URL", "encode_stats", "metrics_v1", "metrics_v2"]

METRICS_V1_URL = "io.containerd.cgroups.v1.Metrics"
METRICS_V2_URL = "io.containerd.cgroups.v2.Metrics"
MAX_U64 = 2**64 - 1
"""Means "no limit" in both formats."""

# name in the message -> names in memory.stat, v1's first
_V1_MEMORY = {
    "rss": ("rss", "anon"),
    "rss_huge": ("rss_huge", "anon_thp"),
    "mapped_file": ("mapped_file", "file_mapped"),
    "dirty": ("dirty", "file_dirty"),
    "writeback": ("writeback", "file_writeback"),
    "pg_pg_in": ("pgpgin",),
    "pg_pg_out": ("pgpgout",),
    "pg_fault": ("pgfault",),
    "pg_maj_fault": ("pgmajfault",),
    "inactive_anon": ("inactive_anon",),
    "active_anon": ("active_anon",),
    "inactive_file": ("inactive_file",),
    "active_file": ("active_file",),
    "unevictable": ("unevictable",),
}
_V2_MEMORY = {
    "anon": ("anon", "total_rss", "rss"),
    "file": ("file", "total_cache", "cache"),
    "file_mapped": ("file_mapped", "total_mapped_file", "mapped_file"),
    "file_dirty": ("file_dirty", "total_dirty", "dirty"),
    "file_writeback": ("file_writeback", "total_writeback", "writeback"),
    "anon_thp": ("anon_thp", "total_rss_huge", "rss_huge"),
} | {
    name: (name, f"total_{name}")
    for name in (
        "kernel_stack",
        "slab",
        "sock",
        "shmem",
        "inactive_anon",
        "active_anon",
        "inactive_file",
        "active_file",
        "unevictable",
        "slab_reclaimable",
        "slab_unreclaimable",
        "pgfault",
        "pgmajfault",
        "workingset_refault",
        "workingset_activate",
        "workingset_nodereclaim",
        "pgrefill",
        "pgscan",
        "pgsteal",
        "pgactivate",
        "pgdeactivate",
        "pglazyfree",
        "pglazyfreed",
        "thp_fault_alloc",
        "thp_collapse_alloc",
    )
}
_SPLIT_COUNTERS = ("workingset_refault", "workingset_activate")  # newer kernels count them for _anon and _file


_ALWAYS_V1 = (
    *("pids", "cpu", "cpu.usage", "cpu.throttling", "memory", "memory.usage", "memory.swap", "memory.kernel"),
    *("memory.kernel_tcp", "blkio", "rdma", "memory_oom_control"),
)
_ALWAYS_V2 = ("pids", "cpu", "memory", "rdma", "io", "memory_events")
_EVENTS = ("low", "high", "max", "oom", "oom_kill", "oom_group_kill")


def encode_stats(stats: agent_pb2.StatsContainerResponse, host_version: int) -> tuple[str, bytes]:
    """(type_url, value) of the Any in a StatsResponse on a host with that cgroup version."""
    if host_version == 2:
        return METRICS_V2_URL, metrics_v2(stats).SerializeToString()
    return METRICS_V1_URL, metrics_v1(stats).SerializeToString()


def metrics_v1(stats: agent_pb2.StatsContainerResponse) -> metrics_v1_pb2.Metrics:
    """In v1's format: times in nanoseconds; `swap` is memory and swap together, as in memory.memsw."""
    group, metrics = stats.cgroup_stats, metrics_v1_pb2.Metrics()
    _set_present(metrics, _ALWAYS_V1)
    usage, throttling = group.cpu_stats.cpu_usage, group.cpu_stats.throttling_data
    metrics.pids.current, metrics.pids.limit = group.pids_stats.current, group.pids_stats.limit
    metrics.cpu.usage.total = usage.total_usage
    metrics.cpu.usage.kernel = usage.usage_in_kernelmode
    metrics.cpu.usage.user = usage.usage_in_usermode
    metrics.cpu.usage.per_cpu.extend(usage.percpu_usage)
    metrics.cpu.throttling.periods = throttling.periods
    metrics.cpu.throttling.throttled_periods = throttling.throttled_periods
    metrics.cpu.throttling.throttled_time = throttling.throttled_time
    _fill_v1_memory(metrics.memory, group.memory_stats)
    metrics.memory_oom_control.oom_kill = group.memory_stats.events.get("oom_kill", 0)
    for field in group.blkio_stats.DESCRIPTOR.fields_by_name:
        for entry in getattr(group.blkio_stats, field):
            getattr(metrics.blkio, field).add(op=entry.op, major=entry.major, minor=entry.minor, value=entry.value)
    for size, pages in sorted(group.hugetlb_stats.items()):
        metrics.hugetlb.add(pagesize=size, usage=pages.usage, max=pages.max_usage, failcnt=pages.failcnt)
    _fill_network(metrics.network, stats)
    return metrics


def _fill_v1_memory(memory: metrics_v1_pb2.MemoryStat, given: agent_pb2.MemoryStats) -> None:
    memory.cache = memory.total_cache = given.cache
    for name, keys in _V1_MEMORY.items():
        own = _first(given.stats, keys)
        setattr(memory, name, own)
        setattr(memory, f"total_{name}", _first(given.stats, (f"total_{keys[0]}",), own))
    memory.hierarchical_memory_limit = _first(given.stats, ("hierarchical_memory_limit",), given.usage.limit)
    for entry, source in ((memory.usage, given.usage), (memory.kernel, given.kernel_usage)):
        entry.usage, entry.max, entry.failcnt = source.usage, source.max_usage, source.failcnt
        entry.limit = source.limit
    memory.kernel.limit = given.kernel_usage.limit or MAX_U64  # in v2 part of the memory, without a limit of its own
    memory.kernel_tcp.usage, memory.kernel_tcp.limit = given.stats.get("sock", 0), MAX_U64
    is_v1 = "hierarchical_memsw_limit" in given.stats  # swap_usage is memsw here
    swap = given.swap_usage
    memory.swap.usage = swap.usage if is_v1 else _sum(given.usage.usage, swap.usage)
    memory.swap.limit = swap.limit if is_v1 else _sum(given.usage.limit, swap.limit)
    memory.swap.max = swap.max_usage if is_v1 else _sum(given.usage.max_usage, swap.max_usage)
    memory.swap.failcnt = swap.failcnt
    memory.hierarchical_swap_limit = _first(given.stats, ("hierarchical_memsw_limit",), memory.swap.limit)


def metrics_v2(stats: agent_pb2.StatsContainerResponse) -> metrics_v2_pb2.Metrics:
    """In v2's format: times in microseconds."""
    group, metrics = stats.cgroup_stats, metrics_v2_pb2.Metrics()
    _set_present(metrics, _ALWAYS_V2)
    usage, throttling, given = group.cpu_stats.cpu_usage, group.cpu_stats.throttling_data, group.memory_stats
    metrics.pids.current, metrics.pids.limit = group.pids_stats.current, group.pids_stats.limit or MAX_U64
    metrics.cpu.usage_usec = usage.total_usage // 1000
    metrics.cpu.user_usec = usage.usage_in_usermode // 1000
    metrics.cpu.system_usec = usage.usage_in_kernelmode // 1000
    metrics.cpu.nr_periods, metrics.cpu.nr_throttled = throttling.periods, throttling.throttled_periods
    metrics.cpu.throttled_usec = throttling.throttled_time // 1000
    for name, keys in _V2_MEMORY.items():
        setattr(metrics.memory, name, _first(given.stats, keys))
    for name in _SPLIT_COUNTERS:
        if name not in given.stats:
            parts = (given.stats.get(f"{name}_{part}", 0) for part in ("anon", "file"))
            setattr(metrics.memory, name, _sum(*parts))
    metrics.memory.usage, metrics.memory.usage_limit = given.usage.usage, given.usage.limit
    metrics.memory.max_usage = given.usage.max_usage
    metrics.memory.swap_usage, metrics.memory.swap_limit = given.swap_usage.usage, given.swap_usage.limit
    metrics.memory.swap_max_usage = given.swap_usage.max_usage
    metrics.memory_events.max = given.usage.failcnt
    for name in _EVENTS:
        if name in given.events:
            setattr(metrics.memory_events, name, given.events[name])
    _fill_io(metrics.io, group.blkio_stats)
    for size, pages in sorted(group.hugetlb_stats.items()):
        metrics.hugetlb.add(pagesize=size, current=pages.usage, max=pages.limit or MAX_U64, failcnt=pages.failcnt)
    _fill_network(metrics.network, stats)
    return metrics


def _fill_io(io: metrics_v2_pb2.IOStat, given: agent_pb2.BlkioStats) -> None:
    devices: dict[tuple[int, int], dict[str, int]] = {}
    sources = (
        (given.io_service_bytes_recursive, {"read": "rbytes", "write": "wbytes"}),
        (given.io_serviced_recursive, {"read": "rios", "write": "wios"}),
    )
    for entries, names in sources:
        for entry in entries:
            if (name := names.get(entry.op.lower())) is not None:
                devices.setdefault((entry.major, entry.minor), {})[name] = entry.value
    for (major, minor), counters in sorted(devices.items()):
        io.usage.add(major=major, minor=minor, **counters)


def _fill_network(target: Any, stats: agent_pb2.StatsContainerResponse) -> None:
    """`target`: the repeated NetworkStat of either version; both have the same fields."""
    for interface in stats.network_stats:
        target.add(
            name=interface.name,
            rx_bytes=interface.rx_bytes,
            rx_packets=interface.rx_packets,
            rx_errors=interface.rx_errors,
            rx_dropped=interface.rx_dropped,
            tx_bytes=interface.tx_bytes,
            tx_packets=interface.tx_packets,
            tx_errors=interface.tx_errors,
            tx_dropped=interface.tx_dropped,
        )


def _set_present(metrics: Any, paths: tuple[str, ...]) -> None:
    for path in paths:
        part = metrics
        for name in path.split("."):
            part = getattr(part, name)
        part.SetInParent()


def _first(stats: Mapping[str, int], keys: tuple[str, ...], default: int = 0) -> int:
    return next((stats[key] for key in keys if key in stats), default)


def _sum(*values: int) -> int:
    """Clamp to the field's range: the guest may report anything."""
    return min(sum(values), MAX_U64)
