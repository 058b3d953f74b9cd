"""`kata-runtime direct-volume`: what storage drivers use for block devices that guests mount themselves."""

import json
import sys
from urllib.parse import quote

import click

from katapod.cli.command import HOST_PATH, group, option
from katapod.cli.management import ask
from katapod.cli.settings import Globals, need_root

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
    """Block devices that a guest mounts itself, as volumes."""


@direct_volume.command(short_help="Announce a volume that containers can mount.")
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
    """Announce a volume: containers that mount PATH get the device's file system."""
    need_root("direct-volume")
    from katapod.host.direct_volumes import add_volume

    add_volume(settings.states().layout, volume_path, mount_info.encode(errors="surrogateescape"))


@direct_volume.command()
@the_path
@click.pass_obj
def remove(settings: Globals, volume_path: str) -> None:
    """Take the announcement back."""
    need_root("direct-volume")
    from katapod.host.direct_volumes import remove_volume

    remove_volume(settings.states().layout, volume_path)


@direct_volume.command()
@the_path
@click.pass_obj
def stats(settings: Globals, volume_path: str) -> None:
    """Print how full a volume is, as the guest sees it."""
    owner = _owner(settings, volume_path)
    answer = ask(settings, owner, "GET", f"/direct-volume/stats?path={quote(volume_path, safe='')}")
    sys.stdout.write(answer.decode(errors="replace") + "\n")


@direct_volume.command()
@the_path
@option("--size", metavar="BYTES", type=click.IntRange(min=1), required=True, help="The new size.")
@click.pass_obj
def resize(settings: Globals, volume_path: str, size: int) -> None:
    """Tell the guest that a volume has a new size."""
    owner = _owner(settings, volume_path)
    body = json.dumps({"VolumePath": volume_path, "Size": size}).encode()
    ask(settings, owner, "POST", "/direct-volume/resize", body)


def _owner(settings: Globals, volume_path: str) -> str:
    need_root("direct-volume")
    from katapod.host.direct_volumes import owner_of_volume

    return owner_of_volume(settings.states().layout, volume_path)
