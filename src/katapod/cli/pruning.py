"""`prune`, `system df`, `system prune`: what takes space, and what nobody needs any more."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from katapod.cli.asking import agreed
from katapod.cli.command import flag, group, option, verb
from katapod.cli.containers import each
from katapod.cli.formats import print_rows, the_format
from katapod.cli.settings import Globals, need_root
from katapod.cli.tables import shown_size
from katapod.model.record import SandboxRecord

if TYPE_CHECKING:
    from katapod.host.volumes import VolumeRecord

__all__ = ["prune_containers", "system"]


@group()
def system() -> None:
    """See what takes space, and remove what nobody needs."""


def _stopped(settings: Globals) -> list[SandboxRecord]:
    from katapod.sandbox.listing import list_sandboxes

    found = list_sandboxes(settings.states())
    return [each.record for each in found if each.lost or _rests(each.record)]


def _rests(record: SandboxRecord) -> bool:
    return (record.is_over or record.at_rest) and not record.restart_at


def _unused_volumes(settings: Globals) -> "list[VolumeRecord]":
    from katapod.host.volumes import VolumeStore

    used = {name for each in settings.states().records() for one in each.containers for name in one.volumes}
    return [each for each in VolumeStore(settings.layout.volume_root).list() if each.name not in used]


@verb("prune")
@flag("-f", "--force", help="Do not ask.")
@click.pass_obj
def prune_containers(settings: Globals, force: bool) -> int:
    """Remove all containers that have stopped, and print their names."""
    need_root("prune")
    chosen = _stopped(settings)
    if chosen and not agreed(f"remove {len(chosen)} containers that have stopped?", force):
        return 1
    return _delete(settings, chosen)


def _delete(settings: Globals, records: list[SandboxRecord]) -> int:
    from katapod.sandbox.deletion import delete_sandbox

    async def one(name: str) -> None:
        await delete_sandbox(settings.states(), name)
        print(name)

    return each(tuple(record.sandbox_id for record in records), one)


@system.command("prune", short_help="Remove stopped containers, and more with -a and --volumes.")
@flag("-f", "--force", help="Do not ask.")
@flag("-a", "--all", "images", help="Images that no container has, too.")
@flag("--volumes", help="Volumes that were made without a name and that no container has, too.")
@option("--filter", "wanted", metavar="K=V", help="None is known.")
@click.pass_obj
def prune_all(settings: Globals, force: bool, images: bool, volumes: bool, wanted: str) -> int:
    """Remove containers that have stopped, and, if that is said, images and volumes that no container has."""
    need_root("system prune")
    from katapod.host.volumes import VolumeStore
    from katapod.model.errors import UsageError

    if wanted:
        raise UsageError(f"cannot use --filter {wanted!r}: none is known", hint="kata-runtime list --filter ... -q")
    if not agreed("remove containers that have stopped, and what else was named?", force):
        return 1
    failed = _delete(settings, _stopped(settings))
    if volumes:
        store = VolumeStore(settings.layout.volume_root)
        for each in _unused_volumes(settings):
            if each.anonymous:
                store.remove(each.name)
                print(each.name)
    if images:
        from katapod.cli.image_verbs import prune_images

        failed = asyncio.run(prune_images(settings, force=True, everything=True)) or failed
    return failed


@system.command("df", short_help="Show what images, containers and volumes take.")
@flag("-v", "--verbose", help="Taken; list, image ls and volume ls show each.")
@the_format
@click.pass_obj
def df(settings: Globals, verbose: bool, form: str) -> None:
    """Show the space that images, containers and volumes take on disk, and how much of it nobody needs."""
    need_root("system df")
    from katapod.host.volumes import VolumeStore

    store = settings.image_store()
    images = asyncio.run(store.list_images())
    records = settings.states().records()
    stopped = {each.sandbox_id for each in _stopped(settings)}
    volumes = VolumeStore(settings.layout.volume_root)
    unused = {each.name for each in _unused_volumes(settings)}
    sizes = {each.name: disk_bytes(volumes.data(each.name)) for each in volumes.list()}
    data = {each.sandbox_id: disk_bytes(settings.layout.sandbox(each.sandbox_id).data) for each in records}
    used = [each for each in images if store.users(each.digest)]
    all_bytes, used_bytes = sum(each.size_bytes for each in images), sum(each.size_bytes for each in used)
    rows = [
        _row("Images", len(images), len(used), all_bytes, all_bytes - used_bytes),
        _row(
            "Containers",
            len(data),
            len(data) - len(stopped & data.keys()),
            sum(data.values()),
            sum(size for name, size in data.items() if name in stopped),
        ),
        _row(
            "Local Volumes",
            len(sizes),
            len(sizes) - len(unused),
            sum(sizes.values()),
            sum(size for name, size in sizes.items() if name in unused),
        ),
    ]
    columns = {"TYPE": "Type", "TOTAL": "TotalCount", "ACTIVE": "Active", "SIZE": "Size", "RECLAIMABLE": "Reclaimable"}
    print_rows(rows, form, columns)


def _row(kind: str, total: int, active: int, size: int, reclaimable: int) -> dict[str, str]:
    share = f" ({reclaimable * 100 // size}%)" if size else ""
    return {
        "Type": kind,
        "TotalCount": str(total),
        "Active": str(active),
        "Size": shown_size(size),
        "Reclaimable": f"{shown_size(reclaimable)}{share}",
    }


def disk_bytes(root: Path) -> int:
    """What a tree takes on disk: blocks, each file once. What goes meanwhile is left out."""
    seen = set[tuple[int, int]]()
    total = 0
    for status in _walk(root):
        if (status.st_dev, status.st_ino) not in seen:
            seen.add((status.st_dev, status.st_ino))
            total += status.st_blocks * 512
    return total


def _walk(root: Path) -> Iterator[os.stat_result]:
    for directory, _, files in os.walk(root):
        for name in ("", *files):
            try:
                yield os.lstat(os.path.join(directory, name))
            except OSError:
                continue
