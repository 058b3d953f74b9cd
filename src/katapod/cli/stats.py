"""The samples behind `kata-runtime stats`."""

import asyncio
import json
import sys
import time
from collections.abc import Sequence

from msgspec import Struct

from katapod.cli.formats import print_rows
from katapod.cli.plain_output import raw
from katapod.cli.tables import Column, print_table, shown_size
from katapod.host.state import StateStore
from katapod.model.errors import KatapodError
from katapod.model.record import State
from katapod.rpc.pb import agent_pb2
from katapod.rpc.status import RpcError
from katapod.sandbox.client import connect_control

__all__ = ["Showing", "show_stats"]

UNLIMITED = 2**62  # cgroup "max" arrives as a number near 2^63


class Sample(Struct, frozen=True):
    name: str
    taken_at: float  # seconds, monotonic
    cpu_ns: int
    memory_bytes: int
    memory_limit_bytes: int
    pids: int


class Showing(Struct, frozen=True):
    """`form`: the template of --format."""

    as_json: bool
    once: bool
    interval_s: float
    form: str = ""


async def show_stats(store: StateStore, names: Sequence[str], how: Showing) -> int:
    """Print samples until interrupted, or one. A named container that does not run is an error."""
    chosen = names or [record.sandbox_id for record in store.records() if record.state is State.RUNNING]
    once, interval_s = how.once, how.interval_s
    before = await _sample_all(store, chosen, strict=bool(names))
    while True:
        await asyncio.sleep(min(interval_s, 1.0) if once or how.as_json else interval_s)
        now = await _sample_all(store, chosen, strict=bool(names) and once)
        rows = [(sample, _cpu_percent(before.get(sample.name), sample)) for sample in now.values()]
        if how.as_json:
            print(json.dumps([_as_json(sample, cpu) for sample, cpu in rows], indent=2))
            return 0
        if how.form:
            print_rows([_docker_row(sample, cpu) for sample, cpu in rows], how.form, DOCKER_COLUMNS)
            sys.stdout.flush()
            if once or not now:
                return 0
            before = now
            continue
        if not once and sys.stdout.isatty():
            raw(sys.stdout).write("\033[H\033[2J")
        print_table(
            [
                Column("NAME", lambda row: row[0].name),
                Column("CPU %", lambda row: f"{row[1]:.1f} %"),
                Column("MEM USAGE / LIMIT", lambda row: _shown_memory(row[0])),
                Column("PIDS", lambda row: str(row[0].pids)),
            ],
            rows,
        )
        if once or not now:
            return 0
        before = now


async def _sample_all(store: StateStore, names: Sequence[str], *, strict: bool) -> dict[str, Sample]:
    found = {}
    for name in names:
        try:
            found[name] = await _sample(store, name)
        except KatapodError:
            if strict:
                raise
    return found


async def _sample(store: StateStore, name: str) -> Sample:
    async with connect_control(store, name) as client:
        try:
            answer = await client.agent.call(
                "StatsContainer", agent_pb2.StatsContainerRequest(container_id=name), timeout_s=10
            )
        except RpcError as exc:
            raise KatapodError(f"cannot read the statistics of {name}: {exc.message}") from exc
    stats = answer.cgroup_stats
    return Sample(
        name,
        time.monotonic(),
        stats.cpu_stats.cpu_usage.total_usage,
        stats.memory_stats.usage.usage,
        stats.memory_stats.usage.limit,
        stats.pids_stats.current,
    )


def _cpu_percent(before: Sample | None, now: Sample) -> float:
    if before is None or now.taken_at <= before.taken_at:
        return 0.0
    return max(0.0, (now.cpu_ns - before.cpu_ns) / (now.taken_at - before.taken_at) / 1e7)


def _shown_limit(limit_bytes: int) -> str:
    return shown_size(limit_bytes) if 0 < limit_bytes < UNLIMITED else "none"


def _shown_memory(sample: Sample) -> str:
    return f"{shown_size(sample.memory_bytes)} / {_shown_limit(sample.memory_limit_bytes)}"


DOCKER_COLUMNS = {
    "NAME": "Name",
    "CPU %": "CPUPerc",
    "MEM USAGE / LIMIT": "MemUsage",
    "MEM %": "MemPerc",
    "PIDS": "PIDs",
}


def _docker_row(sample: Sample, cpu_percent: float) -> dict[str, str]:
    """What is counted in the guest only, of networks and disks, is "--", as where Docker does not know it."""
    limited = 0 < sample.memory_limit_bytes < UNLIMITED
    percent = f"{sample.memory_bytes * 100 / sample.memory_limit_bytes:.2f}%" if limited else "--"
    return {
        "Container": sample.name,
        "Name": sample.name,
        "ID": sample.name,
        "CPUPerc": f"{cpu_percent:.2f}%",
        "MemUsage": _shown_memory(sample),
        "MemPerc": percent,
        "NetIO": "--",
        "BlockIO": "--",
        "PIDs": str(sample.pids),
    }


def _as_json(sample: Sample, cpu_percent: float) -> dict[str, object]:
    return {
        "name": sample.name,
        "cpu_percent": round(cpu_percent, 2),
        "memory_bytes": sample.memory_bytes,
        "memory_limit_bytes": sample.memory_limit_bytes if 0 < sample.memory_limit_bytes < UNLIMITED else None,
        "pids": sample.pids,
    }
