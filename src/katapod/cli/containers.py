"""`list`, `kill`, `pause`, `resume`, `stats`, `delete`: containers as a whole."""

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from katapod.cli.settings import Globals, need_root, print_error
from katapod.cli.tables import Column, print_table, shown_age
from katapod.model.errors import InvalidState, KatapodError
from katapod.model.flags import parse_signal
from katapod.model.ids import parse_container_name
from katapod.model.plain import plain

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from katapod.model.record import SandboxRecord
    from katapod.sandbox.client import ControlClient

__all__ = ["register"]

Names = Annotated[list[str], typer.Argument(metavar="NAME...", help="Containers, by name.")]


def register(app: typer.Typer) -> None:
    app.command("list", short_help="List containers.")(list_containers)
    app.command("ps", hidden=True)(list_containers)
    app.command("kill", short_help="Send a signal to containers.")(kill)
    app.command("pause", short_help="Stop all processes of containers for a while.")(pause)
    app.command("resume", short_help="Let paused containers go on.")(resume)
    app.command("stats", short_help="Show what containers use.")(stats)
    app.command("delete", short_help="Remove containers.")(delete)
    app.command("rm", hidden=True)(delete)


def list_containers(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print names only.")] = False,
) -> None:
    """List all containers, running or stopped, newest first."""
    need_root("list")
    from katapod.host.state import owner_alive
    from katapod.model.record import State

    settings: Globals = context.obj
    store = settings.states()
    rows: list[dict[str, Any]] = []
    for record in sorted(store.records(), key=lambda item: -item.created_at):
        if record.pooled:
            continue  # nobody's yet: `factory status` shows it
        lost = record.state is not State.STOPPED and not owner_alive(store.layout.sandbox(record.sandbox_id))
        rows.append(_describe(record, lost=lost))
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
        "owner_pid": record.owner_pid,
        "vmm_pid": record.vmm_pid,
        "labels": record.labels,
    }


def _shorten(text: str, width: int) -> str:
    text = plain(text)
    return text if len(text) <= width else text[: width - 3] + "..."


def _each(names: list[str], action: Any) -> int:
    """Run `action` (async, one name) for each name; all are tried, errors are printed, the status says."""

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


def _with_owner(
    settings: Globals, action: "Callable[[ControlClient, str], Awaitable[None]]"
) -> "Callable[[str], Awaitable[None]]":
    """Make an action on a container out of one on its owner's control socket."""

    async def one(name: str) -> None:
        from katapod.sandbox.client import connect_control

        async with connect_control(settings.states(), name) as client:
            await action(client, name)

    return one


def kill(
    context: typer.Context,
    names: Names,
    number: Annotated[
        str, typer.Option("-s", "--signal", metavar="SIGNAL", help="Signal, by name or number.")
    ] = "KILL",
) -> int:
    """Send a signal to the main process of containers: KILL unless said otherwise."""
    need_root("kill")
    wanted = parse_signal(number)
    return _each(names, _with_owner(context.obj, lambda client, name: client.kill(name, wanted)))


def pause(context: typer.Context, names: Names) -> int:
    """Freeze all processes of containers, until they are resumed."""
    need_root("pause")
    return _each(names, _with_owner(context.obj, lambda client, name: client.pause(name)))


def resume(context: typer.Context, names: Names) -> int:
    """Let the processes of paused containers go on."""
    need_root("resume")
    return _each(names, _with_owner(context.obj, lambda client, name: client.resume(name)))


def delete(
    context: typer.Context,
    names: Names,
    force: Annotated[bool, typer.Option("-f", "--force", help="End what still runs.")] = False,
) -> int:
    """Remove containers and all they have on this machine, whatever state they are in."""
    need_root("delete")
    settings: Globals = context.obj
    store = settings.states()

    async def one(name: str) -> None:
        from katapod.host.state import owner_alive
        from katapod.model.errors import NotFound
        from katapod.sandbox.recovery import remove_sandbox

        paths = store.layout.sandbox(name)
        if not any(path.exists() for path in paths.all):
            if force:
                return
            raise NotFound(f"cannot delete {name}: there is no such container", hint="see: kata-runtime list")
        if owner_alive(paths) and not force:
            raise InvalidState(
                f"cannot delete {name}: it is running", hint=f"kata-runtime delete --force {name} ends it first"
            )
        await remove_sandbox(store, name, force=force)

    return _each(names, one)


def stats(
    context: typer.Context,
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME...]", help="Default: all that run.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one sample.")] = False,
    no_stream: Annotated[bool, typer.Option("--no-stream", help="Print one sample and end.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="Time between samples.")] = 2.0,
) -> int:
    """Show CPU, memory and processes of running containers, as the guest's kernel counts them."""
    need_root("stats")
    from katapod.cli.stats import show_stats

    settings: Globals = context.obj
    with contextlib.suppress(KeyboardInterrupt):
        return asyncio.run(
            show_stats(
                settings.states(), [parse_container_name(name) for name in names or []], as_json, no_stream, interval
            )
        )
    return 130
