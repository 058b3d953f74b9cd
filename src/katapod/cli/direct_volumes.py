"""`kata-runtime direct-volume`: what storage drivers use for block devices that guests mount themselves."""

import json
import sys
from typing import Annotated
from urllib.parse import quote

import typer

from katapod.cli.management import ask
from katapod.cli.settings import need_root

__all__ = ["register"]

VolumePath = Annotated[
    str, typer.Option("--volume-path", metavar="PATH", help="The path that containers mount.", show_default=False)
]


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="Block devices that a guest mounts itself, as volumes.")
    group.command("add", help="Announce a volume: containers that mount PATH get the device's file system.")(add)
    group.command("remove", help="Take the announcement back.")(remove)
    group.command("stats", help="Print how full a volume is, as the guest sees it.")(stats)
    group.command("resize", help="Tell the guest that a volume has a new size.")(resize)
    app.add_typer(group, name="direct-volume")


def add(
    context: typer.Context,
    volume_path: VolumePath,
    mount_info: Annotated[
        str,
        typer.Option(
            "--mount-info",
            metavar="JSON",
            show_default=False,
            help='{"volume-type": "block", "device": "/dev/...", "fstype": "ext4", "options": [...]}',
        ),
    ],
) -> None:
    need_root("direct-volume")
    from katapod.host.direct_volumes import add_volume

    add_volume(context.obj.states().layout, volume_path, mount_info.encode(errors="surrogateescape"))


def remove(context: typer.Context, volume_path: VolumePath) -> None:
    need_root("direct-volume")
    from katapod.host.direct_volumes import remove_volume

    remove_volume(context.obj.states().layout, volume_path)


def stats(context: typer.Context, volume_path: VolumePath) -> None:
    owner = _owner(context, volume_path)
    answer = ask(context.obj, owner, "GET", f"/direct-volume/stats?path={quote(volume_path, safe='')}")
    sys.stdout.write(answer.decode(errors="replace") + "\n")


def resize(
    context: typer.Context,
    volume_path: VolumePath,
    size: Annotated[int, typer.Option("--size", min=1, metavar="BYTES", help="The new size.", show_default=False)],
) -> None:
    owner = _owner(context, volume_path)
    ask(
        context.obj,
        owner,
        "POST",
        "/direct-volume/resize",
        json.dumps({"VolumePath": volume_path, "Size": size}).encode(),
    )


def _owner(context: typer.Context, volume_path: str) -> str:
    need_root("direct-volume")
    from katapod.host.direct_volumes import owner_of_volume

    return owner_of_volume(context.obj.states().layout, volume_path)
