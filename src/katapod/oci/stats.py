"""The resource usage of a container as `events` of runc has it. Pure.

Source: runc, types/events.go. What a guest does not count is 0.
"""

from typing import Any

__all__ = ["runc_stats"]


def runc_stats(response: Any) -> dict[str, Any]:
    """`response`: the agent's StatsContainerResponse. Times are nanoseconds, sizes bytes."""
    cgroup = response.cgroup_stats
    cpu, memory, pids = cgroup.cpu_stats, cgroup.memory_stats, cgroup.pids_stats
    return {
        "cpu": {
            "usage": {
                "total": cpu.cpu_usage.total_usage,
                "kernel": cpu.cpu_usage.usage_in_kernelmode,
                "user": cpu.cpu_usage.usage_in_usermode,
            },
            "throttling": {
                "periods": cpu.throttling_data.periods,
                "throttledPeriods": cpu.throttling_data.throttled_periods,
                "throttledTime": cpu.throttling_data.throttled_time,
            },
        },
        "memory": {
            "cache": memory.cache,
            "usage": _size(memory.usage),
            "swap": _size(memory.swap_usage),
            "kernel": _size(memory.kernel_usage),
            "raw": dict(memory.stats),
        },
        "pids": {"current": pids.current, "limit": pids.limit},
        "blkio": {},
        "hugetlb": {},
        "intel_rdt": {},
        "network_interfaces": [
            {
                "Name": each.name,
                "RxBytes": each.rx_bytes,
                "RxPackets": each.rx_packets,
                "RxErrors": each.rx_errors,
                "RxDropped": each.rx_dropped,
                "TxBytes": each.tx_bytes,
                "TxPackets": each.tx_packets,
                "TxErrors": each.tx_errors,
                "TxDropped": each.tx_dropped,
            }
            for each in response.network_stats
        ],
    }


def _size(part: Any) -> dict[str, int]:
    return {"limit": part.limit, "usage": part.usage, "max": part.max_usage, "failcnt": part.failcnt}
