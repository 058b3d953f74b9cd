"""`list`, `kill`, `pause`, `resume`, `stats`, `delete`: containers as a whole."""

import time
from typing import TYPE_CHECKING, Any

import click

from katapod.cli.command import argument, flag, option, verb
from katapod.cli.settings import Globals, need_root, print_error
from katapod.cli.tables import Column, print_table, shown_age
from katapod.model.errors import KatapodError
from katapod.model.ids import parse_container_name
from katapod.model.plain import plain

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from katapod.model.record import SandboxRecord
    from katapod.sandbox.client import ControlClient

__all__ = ["delete", "kill", "list_containers", "pause", "resume", "stats"]

the_names = argument("names", nargs=-1, required=True, metavar="NAME...", help="Names of containers.")


@verb("list")
@flag("--json", "as_json", help="Print JSON.")
@flag("-q", "--quiet", help="Print only names.")
@click.pass_obj
def list_containers(settings: Globals, as_json: bool, quiet: bool) -> None:
    """List all containers, running or stopped, newest first."""
    need_root("list")
    from katapod.sandbox.listing import list_sandboxes

    rows = [_describe(found.record, lost=found.lost) for found in list_sandboxes(settings.states())]
    if as_json:
        import json

        print(json.dumps(rows, indent=2))
    elif quiet:
        for row in rows:
            print(row["name"])
    else:
        columns = [
            Column("NAME", lambda row: row["name"]),
            Column("IMAGE", lambda row: row["image"]),
            Column("COMMAND", lambda row: _shorten(" ".join(row["command"]), 28)),
            Column("STATE", lambda row: row["status"]),
            Column("AGE", lambda row: shown_age(time.time() - row["created"])),
            Column("VM", lambda row: f"{row['vcpus']} vCPU, {row['memory_mib']} MiB, {row['accelerator']}"),
            Column("NETWORK", lambda row: " ".join([*row["addresses"], *row["ports"]])),
        ]
        print_table(columns, rows)
        for row in rows:
            if row["error"]:  # its first line: a guest's last words may follow
                print(f"{row['name']}: {plain(row['error'].splitlines()[0])}")


def _describe(record: "SandboxRecord", *, lost: bool) -> dict[str, Any]:
    container = record.containers[0] if record.containers else None
    state = "dead" if lost else container.state.value if container else record.state.value
    status = state
    if state == "stopped" and container is not None and container.exit_code is not None:
        status = f"stopped ({container.exit_code})" + (", out of memory" if container.oom_killed else "")
    return {
        "name": record.sandbox_id,
        "image": container.image if container else "",
        "command": list(container.command) if container else [],
        "state": state,
        "status": status,
        "exit_code": container.exit_code if container else None,
        "oom_killed": container.oom_killed if container else False,
        "error": record.error,
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


def _each(names: tuple[str, ...], action: "Callable[[str], Awaitable[None]]") -> int:
    """Run `action` for each name; all are tried, errors are printed, the status says."""
    import asyncio

    async def go() -> int:
        failed = 0
        for name in names:
            try:
                await action(parse_container_name(name))
            except KatapodError as exc:
                failed = 1
                print_error(exc)
        return failed

    return asyncio.run(go())


def _with_supervisor(
    settings: Globals, action: "Callable[[ControlClient, str], Awaitable[None]]"
) -> "Callable[[str], Awaitable[None]]":
    """Make an action on a container out of one on its supervisor's control socket."""

    async def one(name: str) -> None:
        from katapod.sandbox.client import connect_control

        async with connect_control(settings.states(), name) as client:
            await action(client, name)

    return one


@verb("kill")
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
    """Send a signal to the main process of containers, KILL by default."""
    need_root("kill")
    from katapod.model.flags import parse_signal

    wanted = parse_signal(number)
    return _each(names, _with_supervisor(settings, lambda client, name: client.kill(name, wanted)))


@verb("pause")
@the_names
@click.pass_obj
def pause(settings: Globals, names: tuple[str, ...]) -> int:
    """Freeze all processes of containers until they are resumed."""
    need_root("pause")
    return _each(names, _with_supervisor(settings, lambda client, name: client.pause(name)))


@verb("resume")
@the_names
@click.pass_obj
def resume(settings: Globals, names: tuple[str, ...]) -> int:
    """Resume the processes of paused containers."""
    need_root("resume")
    return _each(names, _with_supervisor(settings, lambda client, name: client.resume(name)))


@verb("delete")
@the_names
@flag("-f", "--force", help="Kill containers that are still running.")
@click.pass_obj
def delete(settings: Globals, names: tuple[str, ...], force: bool) -> int:
    """Remove containers, in whatever state, with all that they have on this machine."""
    need_root("delete")
    store = settings.states()

    async def one(name: str) -> None:
        from katapod.sandbox.deletion import delete_sandbox

        await delete_sandbox(store, name, force=force)

    return _each(names, one)


@verb("stats")
@argument("names", nargs=-1, metavar="[NAME...]", help="Default: all running containers.")
@flag("--json", "as_json", help="Print one sample as JSON.")
@flag("--no-stream", help="Print one sample and exit.")
@option(
    "--interval",
    metavar="SECONDS",
    type=click.FloatRange(min=0.1),
    default=2.0,
    show_default=True,
    help="Time between samples.",
)
@click.pass_obj
def stats(settings: Globals, names: tuple[str, ...], as_json: bool, no_stream: bool, interval: float) -> int:
    """Show CPU time, memory and processes of running containers, as the guest's kernel counts them."""
    need_root("stats")
    import asyncio

    from katapod.cli.stats import show_stats

    chosen = [parse_container_name(name) for name in names]
    try:
        return asyncio.run(show_stats(settings.states(), chosen, as_json, no_stream, interval))
    except KeyboardInterrupt:
        return 130
