"""`kata-runtime top`: the processes of a container, as the guest's kernel has them."""

import asyncio

import click

from katapod.cli.command import argument, verb
from katapod.cli.settings import Globals, need_root
from katapod.cli.tables import Column, print_table, shown_size
from katapod.model.errors import InvalidState, KatapodError, UsageError

__all__ = ["top"]


@verb("top", context_settings={"ignore_unknown_options": True})
@argument("name", metavar="NAME", help="Name of a running container.")
@argument("options", nargs=-1, metavar="[PS-OPTIONS]", help="Taken for the usual ones: -ef, aux.")
@click.pass_obj
def top(settings: Globals, name: str, options: tuple[str, ...]) -> None:
    """List the processes of a container. PID and PPID are the guest's."""
    need_root("top")
    from katapod.observe.inspection import collect_facts
    from katapod.sandbox.lookup import find_sandbox

    if any(word not in ("-ef", "-e", "-f", "aux", "-aux", "-eo", "ax") for word in options):
        raise UsageError(
            f"cannot use the ps options {' '.join(options)}: only the usual columns are known",
            hint=f"kata-runtime exec {name} ps {' '.join(options)}",
        )
    store = settings.states()
    found = find_sandbox(store, name)
    container_id = found.container_id or found.record.sandbox_id
    facts = asyncio.run(collect_facts(store, found.record.sandbox_id))
    if facts.guest is None:
        missing = next((each.why for each in facts.missing if each.part.startswith("guest")), "")
        if facts.state != "running":
            raise InvalidState(f"cannot list the processes of {name}: it is {facts.state}")
        raise KatapodError(f"cannot list the processes of {name}: {missing or 'the guest does not answer'}")
    columns = [
        Column("PID", lambda row: str(row.pid)),
        Column("PPID", lambda row: str(row.parent)),
        Column("STATE", lambda row: row.state),
        Column("RSS", lambda row: shown_size(row.rss)),
        Column("COMMAND", lambda row: row.command),
    ]
    print_table(columns, [each for each in facts.guest.processes if each.container == container_id])
