"""`volume ls`, `create`, `inspect`, `rm`, `prune`: directories that outlive the containers which mount them."""

import json
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from katapod.cli.command import argument, flag, group, option, repeatable
from katapod.cli.filters import chosen
from katapod.cli.formats import print_each, print_rows, the_format
from katapod.cli.settings import Globals, need_root, print_error
from katapod.model.errors import InvalidState, KatapodError, NotFound, UsageError
from katapod.model.flags import has_label, parse_label

if TYPE_CHECKING:
    from katapod.host.volumes import VolumeRecord, VolumeStore

__all__ = ["volume"]


@group()
def volume() -> None:
    """Manage volumes: directories of Katapod's that outlive the containers which mount them."""


def _store(settings: Globals) -> "VolumeStore":
    from katapod.host.volumes import VolumeStore

    return VolumeStore(settings.layout.volume_root)


def _users(settings: Globals) -> dict[str, list[str]]:
    """The containers that have each volume, by its name."""
    found: dict[str, list[str]] = {}
    for record in settings.states().records():
        for item in record.containers:
            for name in item.volumes:
                found.setdefault(name, []).append(item.container_id)
    return found


def _described(store: "VolumeStore", record: "VolumeRecord") -> dict[str, Any]:
    """In Docker's words."""
    return {
        "Name": record.name,
        "Driver": "local",
        "Mountpoint": str(store.data(record.name)),
        "CreatedAt": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created_at)),
        "Labels": record.labels,
        "Scope": "local",
        "Anonymous": record.anonymous,
    }


@volume.command("ls", short_help="List volumes.")
@flag("-q", "--quiet", help="Print only names.")
@repeatable("-f", "--filter", "wanted", metavar="K=V", help="Only those: name, label, dangling=true, driver.")
@the_format
@click.pass_obj
def list_volumes(settings: Globals, quiet: bool, wanted: tuple[str, ...], form: str) -> None:
    """List volumes, by name."""
    need_root("volume ls")
    store, users = _store(settings), _users(settings)
    records = chosen(
        store.list(),
        wanted,
        {
            "name": lambda record, value: value in record.name,
            "label": lambda record, value: has_label(record.labels, value),
            "dangling": lambda record, value: (record.name not in users) is (value in ("true", "1")),
            "driver": lambda record, value: value == "local",
        },
    )
    rows = [_described(store, record) | {"Containers": len(users.get(record.name, ()))} for record in records]
    if quiet:
        for row in rows:
            print(row["Name"])
    else:
        print_rows(rows, form, {"NAME": "Name", "CREATED": "CreatedAt", "CONTAINERS": "Containers"})


@volume.command("create", short_help="Make a volume.")
@argument("name", required=False, metavar="[NAME]", help="Default: a random name.")
@repeatable("-l", "--label", metavar="K=V", help="Set a label on the volume.")
@option("-d", "--driver", metavar="DRIVER", help="local, the only one.")
@repeatable("-o", "--opt", metavar="K=V", help="None is known.")
@click.pass_obj
def create(settings: Globals, name: str | None, label: tuple[str, ...], driver: str, opt: tuple[str, ...]) -> None:
    """Make a volume and print its name; one that is there stays as it is."""
    need_root("volume create")
    from katapod.model.ids import new_id
    from katapod.model.mount_flags import parse_volume_name

    if driver not in ("", "local"):
        raise UsageError(f"cannot use --driver {driver!r}: volumes are directories", hint="leave it out")
    if opt:
        raise UsageError(
            f"cannot use --opt {opt[0]!r}: a volume is a plain directory", hint="mount, then run -v DIR:DST"
        )
    new = parse_volume_name(name, "volume create") if name else str(new_id())
    _store(settings).ensure(new, labels=dict(parse_label(item) for item in label))
    print(new)


@volume.command("inspect", short_help="Show volumes.")
@argument("names", nargs=-1, required=True, metavar="NAME...", help="Names of volumes.")
@option("-f", "--format", "form", metavar="TEMPLATE", help="Go template for each; json: a line each.")
@click.pass_obj
def inspect(settings: Globals, names: tuple[str, ...], form: str) -> int:
    """Print volumes as JSON, in Docker's words. One that is not there is told of, and the others are printed."""
    need_root("volume inspect")
    from katapod.model.mount_flags import parse_volume_name

    store, failed, found = _store(settings), 0, []
    for name in names:
        try:
            found.append(_described(store, store.read(parse_volume_name(name, "volume inspect"))))
        except NotFound as exc:
            failed = 1
            print_error(exc)
    if form:
        print_each(found, form)
    else:
        print(json.dumps(found, indent=4))
    return failed


@volume.command("rm", short_help="Remove volumes.")
@argument("names", nargs=-1, required=True, metavar="NAME...", help="Names of volumes.")
@flag("-f", "--force", help="One that is not there is no error.")
@click.pass_obj
def remove(settings: Globals, names: tuple[str, ...], force: bool) -> int:
    """Remove volumes, with all in them. A volume that a container has is kept, also if that has stopped."""
    need_root("volume rm")
    from katapod.model.mount_flags import parse_volume_name

    failed = 0
    for name in names:
        try:
            parse_volume_name(name, "volume rm")
            if users := _users(settings).get(name):
                raise InvalidState(
                    f"cannot remove volume {name}: {', '.join(users)} has it", hint="remove the container first"
                )
            _store(settings).remove(name)
            print(name)
        except KatapodError as exc:
            if not (force and isinstance(exc, NotFound)):
                failed = 1
                print_error(exc)
    return failed


@volume.command("prune", short_help="Remove volumes that nobody has.")
@flag("-f", "--force", help="Do not ask.")
@flag("-a", "--all", "everything", help="Named ones, too; default: those that were made without a name.")
@click.pass_obj
def prune(settings: Globals, force: bool, everything: bool) -> int:
    """Remove volumes that no container has: those that were made without a name, or all."""
    need_root("volume prune")
    store, users = _store(settings), _users(settings)
    unused = [record for record in store.list() if record.name not in users]
    return _prune(store, (record.name for record in unused if everything or record.anonymous), force)


def _prune(store: "VolumeStore", names: Iterable[str], force: bool) -> int:
    from katapod.cli.asking import agreed

    unused = list(names)
    if unused and not agreed(f"remove {len(unused)} volumes with all in them?", force):
        return 1
    for name in unused:
        store.remove(name)
        print(name)
    store.sweep()
    return 0
