"""`kata-runtime inspect`: all of a sandbox in one command: as a tree, as JSON, as a picture."""

import sys
from pathlib import Path

import click

from katapod.cli.command import HOST_PATH, argument, flag, option, verb
from katapod.cli.settings import Globals, need_root, print_error
from katapod.model.errors import KatapodError, UsageError

__all__ = ["inspect"]


@verb("inspect")
@argument(
    "sandboxes",
    nargs=-1,
    required=True,
    metavar="SANDBOX...",
    help="Name or ID of a sandbox, or the beginning of one; or a container of a pod. Several with --format only.",
)
@option(
    "-f",
    "--format",
    "form",
    metavar="TEMPLATE",
    help="Go template over what docker inspect prints: '{{.State.Status}}'; json: all of it.",
)
@option("--type", "kind", metavar="container", help="Taken; image, volume and network have an inspect of their own.")
@flag("--json", "as_json", help="Print JSON; its keys are in docs/how-to/inspect.md.")
@option(
    "--svg", metavar="FILE", type=HOST_PATH, help="Draw the paths of the data to FILE, or to standard output for '-'."
)
@flag("--all", "-a", "full", help="Show long lists in full.")
@click.pass_obj
def inspect(settings: Globals, /, sandboxes: tuple[str, ...], as_json: bool, svg: str, full: bool, **more: str) -> int:
    """Show how a sandbox works, from the host's processes to those in the guest.

    Changes nothing. Parts that do not answer within a few seconds are left out and named. The debug console is not
    needed. The exit status is 0 even if parts are missing.
    """
    if more["kind"] not in ("", "container"):
        raise UsageError(
            f"cannot use --type {more['kind']}: this inspects containers",
            hint="kata-runtime image inspect, kata-runtime volume inspect, kata-runtime network inspect",
        )
    if more["form"]:
        return _documents(settings, sandboxes, more["form"])
    if len(sandboxes) > 1:
        raise UsageError("cannot show several sandboxes as trees", hint="add --format json, or name one")
    (sandbox,) = sandboxes
    if as_json and svg == "-":
        raise UsageError("cannot print both JSON and the picture: give --svg a file")
    need_root("inspect")
    import asyncio

    from katapod.observe.inspection import collect_facts
    from katapod.sandbox.lookup import find_sandbox

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


def _documents(settings: Globals, names: tuple[str, ...], form: str) -> int:
    """Each by the template; a name that is not there is told of, and the others are printed."""
    need_root("inspect")
    from katapod.cli.formats import print_each
    from katapod.observe.docker_view import container_document
    from katapod.sandbox.execs import spec_on_disk
    from katapod.sandbox.listing import is_lost
    from katapod.sandbox.lookup import find_sandbox

    store, failed, found = settings.states(), 0, []
    for name in names:
        try:
            record = find_sandbox(store, name).record
            paths = store.layout.sandbox(record.sandbox_id, record.machine_id)
            spec = spec_on_disk(paths, record.sandbox_id)
        except KatapodError as exc:
            failed = 1
            print_error(exc)
            continue
        found.append(container_document(record, spec, lost=is_lost(store, record), log_path=str(paths.container_log)))
    print_each(found, form)
    return failed


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as exc:
        raise UsageError(f"cannot write {path}: {exc.strerror}") from exc
