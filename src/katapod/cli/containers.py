"""`list`, `kill`, `pause`, `resume`, `stats`, `delete`: containers as a whole."""

import time
from typing import TYPE_CHECKING, Any

import click

from katapod.cli.command import Command, argument, flag, option, repeatable, verb
from katapod.cli.formats import print_rows, the_format
from katapod.cli.settings import Globals, need_root, print_error
from katapod.cli.tables import Column, print_table, shown_age, table_width
from katapod.model.errors import KatapodError
from katapod.model.ids import parse_container_name
from katapod.model.plain import plain

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from katapod.model.record import SandboxRecord
    from katapod.sandbox.client import ControlClient
    from katapod.sandbox.listing import Listed

__all__ = [
    "delete",
    "each",
    "kill",
    "list_containers",
    "pause",
    "resume",
    "stats",
    "the_names",
    "with_supervisor",
]

the_names = argument("names", nargs=-1, required=True, metavar="NAME...", help="Names of containers.")


@verb("list")
@flag("--json", "as_json", help="Print JSON.")
@flag("-q", "--quiet", help="Print only names.")
@flag("-a", "--all", "everything", help="Stopped ones, too, as is always the case.")
@flag("-l", "--latest", help="Only the newest.")
@option("-n", "--last", metavar="N", type=click.IntRange(min=0), default=0, help="Only the N newest; 0: all.")
@flag("--no-trunc", "whole", help="Do not shorten anything.")
@repeatable("-f", "--filter", "wanted", metavar="K=V", help="Only those: name, status, label, ancestor, volume, ...")
@flag("-s", "--size", help="Taken; stats and system df show what containers take.")
@the_format
@click.pass_obj
def list_containers(settings: Globals, /, **flags: Any) -> None:
    """List all containers, running or stopped, newest first.

    The fields of --format are docker's: .Names, .Image, .Command, .CreatedAt, .RunningFor, .State, .Status, .Ports,
    .Networks, .Labels, .Mounts.
    """
    need_root("list")
    from katapod.sandbox.listing import list_sandboxes

    store = settings.states()
    if store.has_kept_strays():
        import asyncio

        from katapod.sandbox.recovery import adopt_kept

        asyncio.run(adopt_kept(store))
    listed = list_sandboxes(store)
    if flags["wanted"]:
        listed = _filtered(listed, flags["wanted"])
    count = 1 if flags["latest"] else flags["last"]
    listed = listed[:count] if count else listed
    if flags["form"]:
        from katapod.observe.docker_view import container_row

        now = time.time()
        columns = {"NAMES": "Names", "IMAGE": "Image", "COMMAND": "Command", "STATUS": "Status", "PORTS": "Ports"}
        print_rows([container_row(one.record, lost=one.lost, now=now) for one in listed], flags["form"], columns)
        return
    rows = [_describe(found.record, lost=found.lost) for found in listed]
    if flags["as_json"]:
        import json

        print(json.dumps(rows, indent=2))
    elif flags["quiet"]:
        for row in rows:
            print(row["name"])
    else:
        _print_containers(rows, whole=flags["whole"])


def _filtered(listed: "list[Listed]", wanted: tuple[str, ...]) -> "list[Listed]":
    from katapod.observe.docker_view import container_row, matches, parse_filter

    filters: dict[str, list[str]] = {}
    for text in wanted:
        key, value = parse_filter(text)
        filters.setdefault(key, []).append(value)
    now = time.time()
    return [one for one in listed if matches(container_row(one.record, lost=one.lost, now=now), one.record, filters)]


def _print_containers(rows: list[dict[str, Any]], *, whole: bool) -> None:
    def command(row: dict[str, Any]) -> str:
        return " ".join(row["command"])

    columns = [
        Column("NAME", lambda row: row["name"]),
        Column("IMAGE", lambda row: row["image"], least=8),
        Column("COMMAND", (lambda row: plain(command(row))) if whole else (lambda row: _shorten(command(row), 28)), 8),
        Column("STATE", lambda row: row["status"]),
        Column("AGE", lambda row: shown_age(time.time() - row["created"])),
        Column("VM", lambda row: f"{row['vcpus']} vCPU, {row['memory_mib']} MiB, {row['accelerator']}"),
        Column("NETWORK", lambda row: " ".join([*row["addresses"], *row["ports"]]), least=12),
    ]
    print_table(columns, rows, width=0 if whole else table_width())
    for row in rows:
        if row["error"]:  # its first line: a guest's last words may follow
            print(f"{row['name']}: {plain(row['error'].splitlines()[0])}")


def _describe(record: "SandboxRecord", *, lost: bool) -> dict[str, Any]:
    container = record.containers[0] if record.containers else None
    state = "dead" if lost else container.state.value if container else record.state.value
    state = "restarting" if record.restart_at and not lost else state
    status = state
    if state in ("stopped", "restarting") and container is not None and container.exit_code is not None:
        status = f"{state} ({container.exit_code})" + (", out of memory" if container.oom_killed else "")
    return {
        "name": record.sandbox_id,
        "image": container.image if container else "",
        "command": list(container.command) if container else [],
        "state": state,
        "status": status,
        "exit_code": container.exit_code if container else None,
        "oom_killed": container.oom_killed if container else False,
        "error": record.error,
        "restart_policy": record.restart,
        "restarts": record.restarts,
        "created": record.created_at,
        "vcpus": record.vcpus,
        "memory_mib": record.mem_mib,
        "accelerator": record.accelerator,
        "network": record.attachment.network if record.attachment else "none",
        "addresses": list(record.attachment.addresses) if record.attachment else [],
        "ports": [str(port) for port in record.attachment.ports] if record.attachment else [],
        "supervisor_pid": record.supervisor_pid,
        "vmm_pid": record.vmm_pid,
        "labels": record.labels,
    }


def _shorten(text: str, width: int) -> str:
    text = plain(text)
    return text if len(text) <= width else text[: width - 3] + "..."


def each(names: tuple[str, ...], action: "Callable[[str], Awaitable[None]]", *, echo: bool = False) -> int:
    """Run `action` for each name, and print it then if `echo`; all are tried, errors are printed, the status says."""
    import asyncio

    async def go() -> int:
        failed = 0
        for name in names:
            try:
                await action(parse_container_name(name))
                if echo:
                    print(name, flush=True)
            except KatapodError as exc:
                failed = 1
                print_error(exc)
        return failed

    return asyncio.run(go())


def with_supervisor(
    settings: Globals, action: "Callable[[ControlClient, str], Awaitable[None]]"
) -> "Callable[[str], Awaitable[None]]":
    """Make an action on a container out of one on its supervisor's control socket."""

    async def one(name: str) -> None:
        from katapod.sandbox.client import connect_control

        async with connect_control(settings.states(), name) as client:
            await action(client, name)

    return one


class _Kill(Command):
    """Signals as kill(1) takes them: -9, -TERM."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        found = list[str]()
        for place, word in enumerate(args):
            if word == "--":
                found += args[place:]
                break
            number = word[1:] if word.startswith("-") and word[1:2].isalnum() and word[1:2] not in "hs" else ""
            found += [f"--signal={number}"] if number.isdigit() or number.isupper() else [word]
        return super().parse_args(ctx, found)


@click.command("kill", cls=_Kill)
@the_names
@option(
    "-s",
    "--signal",
    "number",
    metavar="SIGNAL",
    default="KILL",
    show_default=True,
    help="Signal, by name or number.",
)
@click.pass_obj
def kill(settings: Globals, names: tuple[str, ...], number: str) -> int:
    """Send a signal to the main process of containers, KILL by default. Prints their names."""
    need_root("kill")
    from katapod.model.flags import parse_signal

    wanted = parse_signal(number)
    return each(names, with_supervisor(settings, lambda client, name: client.kill(name, wanted)), echo=True)


@verb("pause")
@the_names
@click.pass_obj
def pause(settings: Globals, names: tuple[str, ...]) -> int:
    """Freeze all processes of containers until they are resumed. Prints their names."""
    need_root("pause")
    return each(names, with_supervisor(settings, lambda client, name: client.pause(name)), echo=True)


@verb("resume")
@the_names
@click.pass_obj
def resume(settings: Globals, names: tuple[str, ...]) -> int:
    """Resume the processes of paused containers. Prints their names."""
    need_root("resume")
    return each(names, with_supervisor(settings, lambda client, name: client.resume(name)), echo=True)


@verb("delete")
@the_names
@flag("-f", "--force", help="Kill containers that are still running.")
@flag("-v", "--volumes", help="Remove volumes that were made for them without a name, too.")
@click.pass_obj
def delete(settings: Globals, names: tuple[str, ...], force: bool, volumes: bool) -> int:
    """Remove containers, in whatever state, with all that they have on this machine. Prints their names."""
    need_root("delete")
    store = settings.states()

    async def one(name: str) -> None:
        from katapod.sandbox.deletion import delete_sandbox

        having = _volumes_of(settings, name) if volumes else ()
        if await delete_sandbox(store, name, force=force):
            print(name, flush=True)
        if having:
            from katapod.supervisor.named_volumes import drop_volumes

            drop_volumes(settings.layout, having)

    return each(names, one)


def _volumes_of(settings: Globals, name: str) -> tuple[str, ...]:
    try:
        record = settings.states().read(name)
    except KatapodError:
        return ()
    return tuple(volume for item in record.containers for volume in item.volumes)


@verb("stats")
@argument("names", nargs=-1, metavar="[NAME...]", help="Default: all running containers.")
@flag("--json", "as_json", help="Print one sample as JSON.")
@flag("--no-stream", help="Print one sample and exit.")
@flag("-a", "--all", "everything", help="Taken; only those that run have statistics.")
@flag("--no-trunc", help="Taken; nothing is shortened.")
@the_format
@option(
    "--interval",
    metavar="SECONDS",
    type=click.FloatRange(min=0.1),
    default=2.0,
    show_default=True,
    help="Time between samples.",
)
@click.pass_obj
def stats(settings: Globals, /, names: tuple[str, ...], **flags: Any) -> int:
    """Show CPU time, memory and processes of running containers, as the guest's kernel counts them.

    The fields of --format are docker's: .Name, .CPUPerc, .MemUsage, .MemPerc, .PIDs.
    """
    need_root("stats")
    import asyncio

    from katapod.cli.stats import Showing, show_stats

    chosen = [parse_container_name(name) for name in names]
    try:
        how = Showing(flags["as_json"], flags["no_stream"], flags["interval"], flags["form"])
        return asyncio.run(show_stats(settings.states(), chosen, how))
    except KeyboardInterrupt:
        return 130
