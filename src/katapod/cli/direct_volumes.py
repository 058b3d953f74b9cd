"""`kata-runtime direct-volume`: what storage drivers use for block devices that guests mount themselves."""

import json
import sys
from urllib.parse import quote

import click

from katapod.cli.command import HOST_PATH, group, option
from katapod.cli.management import ask
from katapod.cli.settings import Globals, need_root
from katapod.model.errors import InvalidState

__all__ = ["direct_volume"]

the_path = option(
    "--volume-path",
    metavar="PATH",
    type=HOST_PATH,
    required=True,
    help="The path that containers mount.",
)


@group()
def direct_volume() -> None:
    """Manage block devices that guests mount as volumes."""


@direct_volume.command(short_help="Register a volume that containers can mount.")
@the_path
@option(
    "--mount-info",
    metavar="JSON",
    type=HOST_PATH,
    required=True,
    help='{"volume-type": "block", "device": "/dev/...", "fstype": "ext4", "options": [...]}',
)
@click.pass_obj
def add(settings: Globals, volume_path: str, mount_info: str) -> None:
    """Register a volume: containers that mount PATH get the device's file system."""
    need_root("direct-volume")
    from katapod.host.direct_volumes import add_volume

    add_volume(settings.states().layout, volume_path, mount_info.encode(errors="surrogateescape"))


@direct_volume.command()
@the_path
@click.pass_obj
def remove(settings: Globals, volume_path: str) -> None:
    """Remove a volume's registration."""
    need_root("direct-volume")
    from katapod.host.direct_volumes import remove_volume

    remove_volume(settings.states().layout, volume_path)


@direct_volume.command()
@the_path
@click.pass_obj
def stats(settings: Globals, volume_path: str) -> None:
    """Print the usage of a volume, as the guest sees it."""
    sandbox_id = _sandbox_of(settings, volume_path)
    answer = ask(settings, sandbox_id, "GET", f"/direct-volume/stats?path={quote(volume_path, safe='')}")
    sys.stdout.write(answer.decode(errors="replace") + "\n")


@direct_volume.command()
@the_path
@option("--size", metavar="BYTES", type=click.IntRange(min=1), required=True, help="The new size.")
@click.pass_obj
def resize(settings: Globals, volume_path: str, size: int) -> None:
    """Tell the guest the new size of a volume."""
    sandbox_id = _sandbox_of(settings, volume_path)
    from katapod.sandbox.recorded import resize_volume, stopped_supervisor

    store = settings.states()
    if supervisor := stopped_supervisor(store, sandbox_id):
        import asyncio

        found = asyncio.run(resize_volume(store, sandbox_id, volume_path, size))
        raise InvalidState(
            f"cannot resize the file system of {volume_path}: its disk has {found} bytes now, but process "
            f"{supervisor}, which speaks with the guest's agent, is stopped by a signal",
            hint=f"let it go on, and try again: kill -CONT {supervisor}",
        )
    body = json.dumps({"VolumePath": volume_path, "Size": size}).encode()
    ask(settings, sandbox_id, "POST", "/direct-volume/resize", body)


def _sandbox_of(settings: Globals, volume_path: str) -> str:
    need_root("direct-volume")
    from katapod.host.direct_volumes import sandbox_of_volume

    return sandbox_of_volume(settings.states().layout, volume_path)
