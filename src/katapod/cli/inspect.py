"""`kata-runtime inspect`: all of a sandbox in one command: as a tree, as JSON, as a picture."""

import sys
from pathlib import Path

import click

from katapod.cli.command import HOST_PATH, argument, flag, option, verb
from katapod.cli.settings import Globals, need_root
from katapod.model.errors import UsageError

__all__ = ["inspect"]


@verb("inspect")
@argument(
    "sandbox", metavar="SANDBOX", help="Name or ID of a sandbox, or the beginning of one; or a container of a pod."
)
@flag("--json", "as_json", help="Print JSON; its keys are in docs/how-to/inspect.md.")
@option(
    "--svg", metavar="FILE", type=HOST_PATH, help="Draw the paths of the data to FILE, or to standard output for '-'."
)
@flag("--all", "-a", "full", help="Show long lists in full.")
@click.pass_obj
def inspect(settings: Globals, sandbox: str, as_json: bool, svg: str, full: bool) -> int:
    """Show how a sandbox works, from the host's processes to those in the guest.

    Changes nothing. Parts that do not answer within a few seconds are left out and named. The debug console is not
    needed. The exit status is 0 even if parts are missing.
    """
    import asyncio

    from katapod.observe.inspection import collect_facts
    from katapod.sandbox.lookup import find_sandbox

    if as_json and svg == "-":
        raise UsageError("cannot print both JSON and the picture: give --svg a file")
    need_root("inspect")
    store = settings.states()
    found = find_sandbox(store, sandbox)
    facts = asyncio.run(collect_facts(store, found.record.sandbox_id))
    if svg:
        from katapod.observe.picture import render_picture

        picture = render_picture(facts)
        if svg == "-":
            sys.stdout.write(picture)
            return 0
        _write(Path(svg), picture)
    if as_json:
        import json

        import msgspec

        # all but ASCII is escaped: nothing that the guest says can steer a terminal
        print(json.dumps(msgspec.to_builtins(facts), indent=2))
    elif svg:
        print(f"the picture is in {svg}", file=sys.stderr)
    else:
        from katapod.cli.inspect_tree import print_tree

        print_tree(facts, everything=full)
    return 0


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as exc:
        raise UsageError(f"cannot write {path}: {exc.strerror}") from exc
