"""GetMetrics: /proc of the guest and of the agent as Prometheus text.

Names, items and units: Kata Containers, docs/design/kata-2-0-metrics.md. Rendering is separate from reading.
"""

from __future__ import annotations

import os

from katapod.agent.stats import CLOCK_TICKS, PAGE_SIZE, interfaces, parse_keyed, read_text
from katapod.rpc.pb import agent_pb2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from katapod.agent.sandbox import Agent

__all__ = ["disk_rows", "filesystems", "meminfo_rows", "render_family", "status_rows"]

Labels = tuple[tuple[str, str], ...]
Row = tuple[Labels, float]

# item: key in /proc/meminfo; a kernel that lacks one gives 0
MEMINFO = {
    "mem_total": "MemTotal", "mem_free": "MemFree", "mem_available": "MemAvailable", "buffers": "Buffers",
    "cached": "Cached", "swap_cached": "SwapCached", "active": "Active", "inactive": "Inactive",
    "active_anon": "Active(anon)", "inactive_anon": "Inactive(anon)", "active_file": "Active(file)",
    "inactive_file": "Inactive(file)", "unevictable": "Unevictable", "mlocked": "Mlocked",
    "high_total": "HighTotal", "high_free": "HighFree", "low_total": "LowTotal", "low_free": "LowFree",
    "mmap_copy": "MmapCopy", "swap_total": "SwapTotal", "swap_free": "SwapFree", "dirty": "Dirty",
    "writeback": "Writeback", "anon_pages": "AnonPages", "mapped": "Mapped", "shmem": "Shmem", "slab": "Slab",
    "s_reclaimable": "SReclaimable", "s_unreclaim": "SUnreclaim", "kernel_stack": "KernelStack",
    "page_tables": "PageTables", "quicklists": "Quicklists", "nfs_unstable": "NFS_Unstable", "bounce": "Bounce",
    "writeback_tmp": "WritebackTmp", "commit_limit": "CommitLimit", "committed_as": "Committed_AS",
    "vmalloc_total": "VmallocTotal", "vmalloc_used": "VmallocUsed", "vmalloc_chunk": "VmallocChunk",
    "hardware_corrupted": "HardwareCorrupted", "anon_hugepages": "AnonHugePages",
    "shmem_hugepages": "ShmemHugePages", "shmem_pmd_mapped": "ShmemPmdMapped", "cma_total": "CmaTotal",
    "cma_free": "CmaFree", "hugepages_total": "HugePages_Total", "hugepages_free": "HugePages_Free",
    "hugepages_rsvd": "HugePages_Rsvd", "hugepages_surp": "HugePages_Surp", "hugepagesize": "Hugepagesize",
    "direct_map_4k": "DirectMap4k", "direct_map_4M": "DirectMap4M", "direct_map_2M": "DirectMap2M",
    "direct_map_1G": "DirectMap1G", "hugetlb": "Hugetlb", "per_cpu": "Percpu", "k_reclaimable": "KReclaimable",
}  # fmt: skip
STATUS = [
    "VmPeak",
    "VmSize",
    "VmLck",
    "VmPin",
    "VmHWM",
    "VmRSS",
    "RssAnon",
    "RssFile",
    "RssShmem",
    "VmData",
    "VmStk",
    "VmExe",
    "VmLib",
    "VmPTE",
    "VmSwap",
    "HugetlbPages",
    "voluntary_ctxt_switches",
    "nonvoluntary_ctxt_switches",
]
IO = ("rchar", "wchar", "syscr", "syscw", "read_bytes", "write_bytes", "cancelled_write_bytes")
CPU = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal", "guest", "guest_nice")
NETDEV = [
    "recv_bytes",
    "recv_packets",
    "recv_errs",
    "recv_drop",
    "recv_fifo",
    "recv_frame",
    "recv_compressed",
    "recv_multicast",
    "sent_bytes",
    "sent_packets",
    "sent_errs",
    "sent_drop",
    "sent_fifo",
    "sent_colls",
    "sent_carrier",
    "sent_compressed",
]
DISK = [
    "reads",
    "merged",
    "sectors_read",
    "time_reading",
    "writes",
    "writes_merged",
    "sectors_written",
    "time_writing",
    "in_progress",
    "time_in_progress",
    "weighted_time_in_progress",
    "discards",
    "discards_merged",
    "sectors_discarded",
    "time_discarding",
    "flushes",
    "time_flushing",
]
DISK_FILESYSTEMS = ("ext4", "xfs", "btrfs", "vfat", "overlay")
FILESYSTEMS_MAX = 64


def render_family(name: str, kind: str, what: str, rows: list[Row]) -> str:
    """One family; empty without rows."""
    if not rows:
        return ""
    lines = [f"# HELP {name} {what}", f"# TYPE {name} {kind}"]
    for labels, value in rows:
        shown = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels)
        lines.append(f"{name}{{{shown}}} {value:.15g}" if shown else f"{name} {value:.15g}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _item(name: str) -> Labels:
    return (("item", name),)


def meminfo_rows(text: str) -> list[Row]:
    """Bytes, except for the counts of huge pages."""
    found = {}
    for line in text.splitlines():
        key, _, rest = line.partition(":")
        value, _, unit = rest.strip().partition(" ")
        if value.isdigit():
            found[key] = int(value) * (1024 if unit == "kB" else 1)
    return [(_item(item), found.get(key, 0)) for item, key in MEMINFO.items()]


def status_rows(text: str) -> list[Row]:
    """/proc/PID/status: KiB as in the file."""
    found = {}
    for line in text.splitlines():
        key, _, rest = line.partition(":")
        value = rest.split()[:1]
        if value and value[0].isdigit():
            found[key] = int(value[0])
    return [(_item(key.lower()), found.get(key, 0)) for key in STATUS]


def disk_rows(text: str) -> list[Row]:
    """/proc/diskstats; older kernels have fewer columns."""
    rows: list[Row] = []
    for line in text.splitlines():
        _, _, disk, *values = line.split()
        rows += [((("disk", disk), ("item", item)), int(value)) for item, value in zip(DISK, values)]  # noqa: B905
    return rows


def filesystems(mounts: str) -> list[tuple[str, str]]:
    """(mount, device) of writable file systems on disks, one per device; from /proc/mounts."""
    found: dict[str, tuple[str, str]] = {}
    for line in mounts.splitlines():
        device, where, kind, options = line.split()[:4]
        if kind in DISK_FILESYSTEMS and "rw" in options.split(","):
            # all overlays have the same name in place of a device
            found.setdefault(where if kind == "overlay" else device, (_unescaped(where), _unescaped(device)))
    return list(found.values())[:FILESYSTEMS_MAX]


def _unescaped(text: str) -> str:
    """Undo the octal escapes of /proc/mounts."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text


def _filesystem_rows() -> tuple[list[Row], list[Row]]:
    sizes: list[Row] = []
    inodes: list[Row] = []
    for where, device in filesystems(read_text("/proc/mounts")):
        try:
            data = os.statvfs(where)
        except OSError:  # unmounted meanwhile
            continue
        labels = (("mount", where), ("device", device))
        unit = data.f_frsize
        for rows, values in (
            (sizes, (data.f_blocks * unit, (data.f_blocks - data.f_bfree) * unit, data.f_bavail * unit)),
            (inodes, (data.f_files, data.f_files - data.f_ffree, data.f_favail)),
        ):
            named = zip(("total", "used", "available"), values)  # noqa: B905
            rows += [((*labels, ("item", item)), value) for item, value in named]
    return sizes, inodes


def _cpu_rows() -> list[Row]:
    rows: list[Row] = []
    for line in read_text("/proc/stat").splitlines():
        name, *values = line.split()
        if name.startswith("cpu"):
            cpu = name[3:] or "total"
            rows += [((("cpu", cpu), ("item", item)), int(value)) for item, value in zip(CPU, values)]  # noqa: B905
    return rows


def _netdev_rows() -> list[Row]:
    return [
        ((("interface", name), ("item", item)), value)
        for name, values in interfaces().items()
        for item, value in zip(NETDEV, values)  # noqa: B905
    ]


async def get_metrics(agent: Agent, request: agent_pb2.GetMetricsRequest) -> agent_pb2.Metrics:
    agent.scrapes += 1
    pages = read_text("/proc/self/statm").split()
    fields = read_text("/proc/self/stat").rpartition(")")[2].split()  # from field 3, "state", on
    io = {
        key.strip(): value
        for key, _, value in (line.partition(":") for line in read_text("/proc/self/io").splitlines())
    }
    load = read_text("/proc/loadavg").split()
    running, _, existing = load[3].partition("/")
    sizes, inodes = _filesystem_rows()
    total_s = (int(fields[11]) + int(fields[12])) / CLOCK_TICKS
    gauges: tuple[tuple[str, str, list[Row]], ...] = (
        ("agent_threads", "Threads of the agent.", [((), int(fields[17]))]),
        ("agent_total_time", "CPU time of the agent, seconds.", [((), total_s)]),
        ("agent_total_vm", "Virtual memory of the agent, bytes.", [((), int(pages[0]) * PAGE_SIZE)]),
        ("agent_total_rss", "Resident memory of the agent, bytes.", [((), int(pages[1]) * PAGE_SIZE)]),
        ("agent_proc_status", "/proc status of the agent, KiB.", status_rows(read_text("/proc/self/status"))),
        ("agent_io_stat", "/proc io of the agent.", [(_item(item), int(io.get(item, 0))) for item in IO]),
        (
            "agent_proc_stat",
            "/proc stat of the agent, clock ticks.",
            [(_item(item), int(fields[11 + at])) for at, item in enumerate(("utime", "stime", "cutime", "cstime"))],
        ),
        ("guest_load", "Load averages.", [(_item(f"load{m}"), float(load[i])) for i, m in enumerate((1, 5, 15))]),
        ("guest_tasks", "Running and existing tasks.", [(_item("cur"), int(running)), (_item("max"), int(existing))]),
        ("guest_cpu_time", "/proc/stat, clock ticks.", _cpu_rows()),
        (
            "guest_vm_stat",
            "/proc/vmstat.",
            [(_item(key), value) for key, value in parse_keyed(read_text("/proc/vmstat")).items()],
        ),
        ("guest_netdev_stat", "Interfaces of the guest.", _netdev_rows()),
        ("guest_diskstat", "/proc/diskstats.", disk_rows(read_text("/proc/diskstats"))),
        ("guest_meminfo", "/proc/meminfo, bytes.", meminfo_rows(read_text("/proc/meminfo"))),
        ("guest_filesystem_bytes", "Writable file systems on disks, bytes.", sizes),
        ("guest_filesystem_inodes", "Writable file systems on disks, inodes.", inodes),
    )
    text = render_family("kata_agent_scrape_count", "counter", "Calls of GetMetrics.", [((), agent.scrapes)])
    return agent_pb2.Metrics(
        metrics=text + "".join(render_family(f"kata_{name}", "gauge", what, rows) for name, what, rows in gauges)
    )
