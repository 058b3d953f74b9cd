"""`diff`: what a running container has changed of its image's files."""

import asyncio
import sys
from typing import TYPE_CHECKING, BinaryIO

import click

from katapod.cli.command import argument, verb
from katapod.cli.copying import mounted_in, read_files
from katapod.cli.settings import Globals, need_root
from katapod.model.errors import InvalidState
from katapod.model.ids import parse_container_name
from katapod.model.plain import plain

if TYPE_CHECKING:
    from katapod.model.file_changes import Change, FileEntry

__all__ = ["diff"]


@verb("diff")
@argument("name", metavar="NAME", help="Name of a running container.")
@click.pass_obj
def diff(settings: Globals, name: str) -> None:
    """Print what a running container has added (A), changed (C) and deleted (D) of the files of its image.

    What is mounted in it is left out. All its files are read, by a tar that it needs, as that of busybox.
    """
    need_root("diff")
    parse_container_name(name)
    for change in asyncio.run(_changes(settings, name)):
        sys.stdout.write(f"{change.kind} /{plain(change.path)}\n")


async def _changes(settings: Globals, name: str) -> "list[Change]":
    """Raises NotFound, InvalidState, KatapodError."""
    from katapod.host.file_lists import entries_of_tar, entries_of_tree
    from katapod.model.file_changes import file_changes

    store = settings.states()
    record = store.read(name)
    container = record.containers[0] if record.containers else None
    if container is None or not container.image_digest:
        raise InvalidState(
            f"cannot compare the files of container {name}: its root file system is a directory or a bundle's",
            hint=f"kata-runtime export {name} | tar -t lists them",
        )
    if record.at_rest:
        raise InvalidState(
            f"cannot compare the files of container {name}: it does not run, and they are on a disk of its VM",
            hint=f"kata-runtime start {name} first",
        )
    after: dict[str, FileEntry] = {}

    def take(stream: BinaryIO) -> None:
        after.update(entries_of_tar(stream))

    mounts = mounted_in(store, name)
    await read_files(store, name, mounts, take)
    before = await asyncio.to_thread(entries_of_tree, settings.image_store().rootfs_path(container.image_digest))
    return file_changes(before, after, mounts)
