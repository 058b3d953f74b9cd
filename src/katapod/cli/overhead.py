"""`kata-runtime overhead`: the RuntimeClass overhead that this node needs, from measurement."""

import asyncio
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from katapod.cli.command import flag, option, verb
from katapod.cli.interrupt import interruptible
from katapod.cli.settings import Globals, need_root
from katapod.cli.tables import Column, print_table
from katapod.model.errors import KatapodError, UsageError
from katapod.model.flags import parse_memory
from katapod.model.ids import new_id, parse_container_name, short_id
from katapod.model.net_flags import NO_NETWORK, NetworkRequest
from katapod.model.overhead import Observation, pod_overhead
from katapod.model.sizing import HOST_OVERHEAD_MIB

if TYPE_CHECKING:
    from katapod.host.state import StateStore
    from katapod.model.config import Config
    from katapod.model.sizing import VmSize

__all__ = ["overhead"]

MIN_LIMIT_MIB = 32
SPARE_MIB = 8  # of the limit: a container that fills it to the last page is killed
SETTLE_S = 4.0  # the guest gives free pages back after two seconds
WATCH_S = 5.0
READY_LIMIT_S = 60.0
POLL_S = 0.2
PIDS_READY = 2  # shell and sleep: the shell has set its trap


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What --json prints, with the observations as they are and the result."""

    memory_mib: int
    cpu_millis: int
    translation_cache_mib: int
    host_overhead_mib: int
    """What the host's part was allowed for by sizing.py, without the translation cache."""
    ceiling_mib: int
    """What a sandbox can take at most: its VM's memory in full, beside the containers' limits."""
    observations: tuple[Observation, ...]


@verb("overhead")
@option("--from", "source", metavar="NAME", help="Measure a running container as it is, and start none.")
@option(
    "-m",
    "--memory",
    metavar="SIZE",
    default="64m",
    show_default=True,
    help="Memory limit of the container to measure with.",
)
@flag("--json", "as_json", help="Print JSON.")
@click.pass_obj
def overhead(settings: Globals, source: str, memory: str, as_json: bool) -> int:
    """Measure what a sandbox takes of this node beyond its containers' limits, and print it for a RuntimeClass.

    Starts a container for this, by the accelerator that pods get, measures it idle and while it fills its memory limit,
    and removes it.
    """
    need_root("overhead")
    limit_mib = (parse_memory(memory) or 0) >> 20
    if limit_mib < MIN_LIMIT_MIB:
        raise UsageError(f"cannot measure with a limit of {memory}: it needs at least {MIN_LIMIT_MIB} MiB")
    config = settings.load_config()
    if source:
        return interruptible(_measure_running(settings.states(), config, parse_container_name(source), as_json))
    name = f"overhead-{short_id(new_id())}"
    found: list[str] = []
    if status := interruptible(_find_accelerator(settings, config, found)):
        return status
    if status := _start(settings, name, limit_mib, found[0]):
        return status
    return interruptible(_measure_own(settings.states(), config, name, limit_mib, as_json))


async def _find_accelerator(settings: Globals, config: "Config", found: list[str]) -> int:
    """Add the one that pods get, which is not always that of a container of `run`."""
    from katapod.host.facts import collect_host_facts
    from katapod.sandbox.ladder import needs_of_config
    from katapod.sandbox.proof import choose_accelerator, wanted_accelerator

    needs = msgspec.structs.replace(needs_of_config(config), resized=True, disks=True)
    facts, proof_file = collect_host_facts(), settings.layout.proof_file
    with tempfile.TemporaryDirectory(prefix="katapod-proof-") as scratch:
        wanted = wanted_accelerator(config)
        choice = await choose_accelerator(wanted, config, facts, proof_file, Path(scratch), needs=needs)
    found.append(choice.accelerator.value)
    return 0


def _start(settings: Globals, name: str, limit_mib: int, accel: str) -> int:
    """Start a container that fills its memory at SIGUSR1. Returns 0, or the status if a signal came between."""
    from katapod.model.mount_flags import parse_tmpfs
    from katapod.plan.container_spec import ContainerOptions
    from katapod.supervisor.run import run_detached
    from katapod.supervisor.run_request import RunRequest

    fill = f"dd if=/dev/zero of=/load/fill bs=1M count={limit_mib - SPARE_MIB} 2>/dev/null"
    script = f"trap '{fill}' USR1; sleep 100000 & wait; sleep 100000 & wait"
    request = RunRequest(
        container_id=parse_container_name(name),
        image="busybox",
        rootfs=None,
        bundle=None,
        options=ContainerOptions(
            args=("sh", "-c", script),
            hostname=name,
            memory_bytes=limit_mib << 20,
            tmpfs=(parse_tmpfs(f"/load:size={limit_mib}m"),),
        ),
        remove=True,
        interactive=False,
        accel=accel,
        labels={},
        stop_signal=None,
        network=NetworkRequest(name=NO_NETWORK),
    )
    return run_detached(settings.run_context(), request)


async def _measure_own(store: "StateStore", config: "Config", name: str, limit_mib: int, as_json: bool) -> int:
    from katapod.observe.overhead import observe
    from katapod.sandbox.recovery import remove_sandbox

    try:
        await _wait_for(store, name, pids=PIDS_READY)
        await asyncio.sleep(SETTLE_S)
        idle = await observe(store, name, "idle", WATCH_S)
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(observe(store, name, "filling", WATCH_S), name="watch")
            group.create_task(_fill(store, name, limit_mib), name="fill")
        filling = watching.result()
        full = await observe(store, name, "full", WATCH_S)
    finally:
        await remove_sandbox(store, name, force=True)
    _report(config, (idle, filling, full), as_json)
    return 0


async def _measure_running(store: "StateStore", config: "Config", name: str, as_json: bool) -> int:
    from katapod.observe.overhead import observe

    seen = await observe(store, name, "as it is", WATCH_S)
    _report(config, (seen,), as_json)
    return 0


async def _fill(store: "StateStore", name: str, limit_mib: int) -> None:
    from katapod.sandbox.client import connect_control

    async with connect_control(store, name) as client:
        await client.kill(name, signal.SIGUSR1)
    await _wait_for(store, name, memory_bytes=limit_mib - SPARE_MIB << 20)


async def _wait_for(store: "StateStore", name: str, *, pids: int = 0, memory_bytes: int = 0) -> None:
    """Until the container has that much. Raises KatapodError after READY_LIMIT_S."""
    from katapod.observe.overhead import container_use
    from katapod.sandbox.client import connect_control

    async with connect_control(store, name) as client:
        try:
            async with asyncio.timeout(READY_LIMIT_S):
                while True:
                    use = await container_use(client.agent, client.record)
                    if use.pids >= pids and use.memory_bytes >= memory_bytes:
                        return
                    await asyncio.sleep(POLL_S)
        except TimeoutError as exc:
            raise KatapodError(f"cannot measure: the container was not ready within {READY_LIMIT_S:g} s") from exc


def _report(config: "Config", seen: tuple[Observation, ...], as_json: bool) -> None:
    emulated = any(each.memory.translated_kib for each in seen)
    cache_mib = config.katapod.translation_cache if emulated else 0
    result = pod_overhead(seen, translation_cache_mib=cache_mib)
    report = Report(
        memory_mib=result.memory_mib,
        cpu_millis=result.cpu_millis,
        translation_cache_mib=cache_mib,
        host_overhead_mib=HOST_OVERHEAD_MIB,
        ceiling_mib=_size(config, cache_mib).pod_overhead_mib,
        observations=seen,
    )
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
    else:
        _print_for_people(report)
        print(result.yaml())
    if max(each.memory.host_kib for each in seen) > HOST_OVERHEAD_MIB << 10:
        print(
            f"kata-runtime: WARNING: the VMM, virtiofsd and the supervisor take more than the {HOST_OVERHEAD_MIB} MiB "
            "that sandboxes are sized with",
            file=sys.stderr,
        )


def _size(config: "Config", cache_mib: int) -> "VmSize":
    from katapod.host.facts import collect_host_facts
    from katapod.model.sizing import ContainerLimits
    from katapod.sandbox.planning import size_for

    limits = (ContainerLimits(memory_bytes=128 << 20),)
    return size_for(config, collect_host_facts(), limits, translation_cache_mib=cache_mib)


def _figure(index: int) -> Callable[[tuple[str, list[float]]], str]:
    return lambda row: f"{row[1][index]:.1f}"


def _print_for_people(report: Report) -> None:
    """Comments of YAML, so that the whole output can go into a file."""
    rows: list[tuple[str, list[float]]] = []
    for index, (part, _) in enumerate(report.observations[0].memory.rows()):
        figures = [each.memory.rows()[index][1] / 1024 for each in report.observations]
        if any(figures):  # each VMM lacks a part or two
            rows.append((part, figures))
    rows.append(("together", [each.memory.total_kib / 1024 for each in report.observations]))
    rows.append(("the containers' own", [each.containers_kib / 1024 for each in report.observations]))
    rows.append(("beyond the containers", [each.beyond_kib / 1024 for each in report.observations]))
    rows.append(("CPU beyond the containers, in 1/1000", [each.beyond_cpu_millis for each in report.observations]))
    columns = [Column("# MIB", lambda row: f"# {row[0]}")]
    for index, each in enumerate(report.observations):
        columns.append(Column(each.phase.upper(), _figure(index)))
    print_table(columns, rows)
    if report.translation_cache_mib:
        print(f"# translated code is counted in full: translation_cache = {report.translation_cache_mib} MiB")
    print(f"# a sandbox can take {report.ceiling_mib} MiB beyond its containers' limits at most")
