"""Metrics of processes of this host, as Prometheus text. Names and items: Kata Containers,
docs/design/kata-2-0-metrics.md.

Text is written by hand: the client library would cost each shim 10 MiB.
"""

import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from katapod.rpc.call_times import BUCKETS_MS, CallTimes

__all__ = ["METRICS_TYPE", "call_times_text", "family_text", "netdev_rows", "process_text", "standard_process_text"]

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
STATUS_ITEMS = (
    "vmpeak",
    "vmsize",
    "vmlck",
    "vmpin",
    "vmhwm",
    "vmrss",
    "rssanon",
    "rssfile",
    "rssshmem",
    "vmdata",
    "vmstk",
    "vmexe",
    "vmlib",
    "vmpte",
    "vmpmd",
    "vmswap",
    "hugetlbpages",
    "voluntary_ctxt_switches",
    "nonvoluntary_ctxt_switches",
)
STAT_ITEMS = {"utime": 11, "stime": 12, "cutime": 13, "cstime": 14}  # index from field 3 of /proc/PID/stat on
IO_ITEMS = {
    "rchar": "rchar",
    "wchar": "wchar",
    "syscr": "syscr",
    "syscw": "syscw",
    "read_bytes": "readbytes",
    "write_bytes": "writebytes",
    "cancelled_write_bytes": "cancelledwritebytes",
}
NETDEV_ITEMS = tuple(
    f"{way}_{item}"
    for way, items in (
        ("recv", "bytes packets errs drop fifo frame compressed multicast"),
        ("sent", "bytes packets errs drop fifo colls carrier compressed"),
    )
    for item in items.split()
)

Row = tuple[Mapping[str, str], float]


def family_text(name: str, kind: str, what: str, rows: Iterable[Row]) -> str:
    """One family of metrics; empty without rows."""
    lines = [f"{name}{_labels(labels)} {value:.15g}\n" for labels, value in rows]
    return "".join([f"# HELP {name} {what}\n# TYPE {name} {kind}\n", *lines]) if lines else ""


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def process_text(prefix: str, who: str, pids: Iterable[int], helpers: Collection[int] = ()) -> str:
    """threads, fds, proc_status, proc_stat and io_stat of processes together; empty if all have ended. `helpers` of the
    first one count, too, but not what they map: it maps that itself."""
    threads, fds = 0, 0
    status, stat, io = dict.fromkeys(STATUS_ITEMS, 0), dict.fromkeys(STAT_ITEMS, 0), dict.fromkeys(IO_ITEMS.values(), 0)
    alive = False
    for pid in (*pids, *helpers):
        directory = Path(f"/proc/{pid}")
        try:
            fields = (directory / "stat").read_text().rpartition(")")[2].split()
            found = _keyed((directory / "status").read_text())
            numbers = _keyed((directory / "io").read_text())
            fds += len(os.listdir(directory / "fd"))
        except (FileNotFoundError, ProcessLookupError):
            continue
        alive = True
        threads += int(fields[17])
        for item in STATUS_ITEMS:
            if pid not in helpers or item.endswith("ctxt_switches"):
                status[item] += found.get(item, 0)
        for item, index in STAT_ITEMS.items():
            stat[item] += int(fields[index])
        for key, item in IO_ITEMS.items():
            io[item] += numbers.get(key, 0)
    if not alive:
        return ""
    return "".join(
        [
            family_text(f"{prefix}_threads", "gauge", f"Threads of {who}.", [({}, threads)]),
            family_text(f"{prefix}_fds", "gauge", f"Open descriptors of {who}.", [({}, fds)]),
            family_text(f"{prefix}_proc_status", "gauge", f"/proc status of {who}, bytes.", _items(status)),
            family_text(f"{prefix}_proc_stat", "gauge", f"/proc stat of {who}, clock ticks.", _items(stat)),
            family_text(f"{prefix}_io_stat", "gauge", f"/proc io of {who}.", _items(io)),
        ]
    )


def _items(values: Mapping[str, int]) -> list[Row]:
    return [({"item": item}, value) for item, value in values.items()]


def _keyed(text: str) -> dict[str, int]:
    """ "Key: number [kB]" lines, names in lower case, sizes in bytes."""
    found = {}
    for line in text.splitlines():
        key, _, rest = line.partition(":")
        value, _, unit = rest.strip().partition(" ")
        if value.isdigit():
            found[key.lower()] = int(value) * (1024 if unit == "kB" else 1)
    return found


def netdev_rows(pid: int) -> list[Row]:
    """The interfaces in the network namespace of a process; none if it has ended."""
    rows: list[Row] = []
    try:
        lines = Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]
    except OSError:
        return []
    for line in lines:
        name, _, rest = line.rpartition(":")
        for item, value in zip(NETDEV_ITEMS, rest.split(), strict=False):
            rows.append(({"interface": name.strip(), "item": item}, float(value)))
    return rows


def standard_process_text(prefix: str, pid: int) -> str:
    """What Prometheus' client libraries tell of their own process. Empty if it has ended."""
    directory = Path(f"/proc/{pid}")
    try:
        fields = (directory / "stat").read_text().rpartition(")")[2].split()
        limits = (directory / "limits").read_text()
        open_fds = len(os.listdir(directory / "fd"))
        booted = _keyed_line(Path("/proc/stat").read_text(), "btime")
    except (FileNotFoundError, ProcessLookupError):
        return ""
    cpu_s = (int(fields[11]) + int(fields[12])) / CLOCK_TICKS
    gauges = {
        "max_fds": _limit(limits, "Max open files"),
        "open_fds": open_fds,
        "resident_memory_bytes": int(fields[21]) * PAGE_BYTES,
        "start_time_seconds": booted + int(fields[19]) / CLOCK_TICKS,
        "virtual_memory_bytes": int(fields[20]),
        "virtual_memory_max_bytes": _limit(limits, "Max address space"),
    }
    name = f"{prefix}_process"
    text = family_text(f"{name}_cpu_seconds_total", "counter", "User and system CPU time, seconds.", [({}, cpu_s)])
    return text + "".join(
        family_text(f"{name}_{item}", "gauge", f"{item.replace('_', ' ').capitalize()}.", [({}, value)])
        for item, value in gauges.items()
    )


def _keyed_line(text: str, key: str) -> float:
    return next((float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{key} ")), 0.0)


def _limit(text: str, name: str) -> float:
    for line in text.splitlines():
        if line.startswith(name):
            soft = line.removeprefix(name).split()[0]
            return float(soft) if soft.isdigit() else -1.0  # unlimited, as the Go library says it
    return -1.0


def call_times_text(times: CallTimes) -> str:
    """The histogram; empty while there was no call."""
    if not times.counts:
        return ""
    lines = [f"# HELP {times.name} {times.what}", f"# TYPE {times.name} histogram"]
    for action, counts in sorted(times.counts.items()):
        total, which = 0, {"action": action} if action else {}
        for bound, count in zip((*map(str, BUCKETS_MS), "+Inf"), counts, strict=True):
            total += count
            lines.append(f"{times.name}_bucket{_labels({**which, 'le': bound})} {total}")
        label = _labels(which)
        lines.append(f"{times.name}_sum{label} {times.sums_ms[action]:.15g}")
        lines.append(f"{times.name}_count{label} {total}")
    return "\n".join(lines) + "\n"
