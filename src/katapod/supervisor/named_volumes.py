"""The named volumes of a container: made when they are first asked for, and filled from its image."""

from collections.abc import Iterable
from pathlib import Path

from msgspec.structs import replace

from katapod.host.volumes import VolumeStore
from katapod.model.ids import new_id
from katapod.model.layout import Layout
from katapod.model.mount_flags import Volume
from katapod.supervisor.run_request import RunRequest

__all__ = ["drop_anonymous", "drop_volumes", "fill_volumes", "with_named_volumes"]


def with_named_volumes(layout: Layout, request: RunRequest) -> RunRequest:
    """Make those that are not there; all are volumes with a source then, and have a name. Raises KatapodError."""
    wanted = request.options.named_volumes
    if not wanted:
        return request
    store = VolumeStore(layout.volume_root)
    if request.again:  # they have been, and are mounted already
        for each in wanted:
            store.ensure(each.name)
        return request
    named = tuple(each if each.name else replace(each, name=new_id()) for each in wanted)
    for before, each in zip(wanted, named, strict=True):
        store.ensure(each.name, anonymous=not before.name)
    more = tuple(
        Volume(source=str(store.data(each.name)), destination=each.destination, read_only=each.read_only)
        for each in named
    )
    options = replace(request.options, named_volumes=named, volumes=(*request.options.volumes, *more))
    return replace(request, options=options)


async def fill_volumes(layout: Layout, request: RunRequest, root: Path) -> None:
    """Copy what an image has at the destination of an empty volume into it, as Docker does. `root`: its files. Raises
    KatapodError."""
    store = VolumeStore(layout.volume_root)
    for each in request.options.named_volumes:
        if each.copy:
            await store.fill(each.name, root, each.destination)


def drop_anonymous(layout: Layout, request: RunRequest) -> None:
    """Remove those that were made for this container alone. Raises KatapodError."""
    drop_volumes(layout, (each.name for each in request.options.named_volumes))


def drop_volumes(layout: Layout, names: Iterable[str]) -> None:
    """Remove those of the volumes that were made without a name. Raises KatapodError."""
    store = VolumeStore(layout.volume_root)
    for name in names:
        if (store.root / name).exists() and store.read(name).anonymous:
            store.remove(name)
