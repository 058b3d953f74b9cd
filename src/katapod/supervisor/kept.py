"""What a container of `run` or `create` was asked for with, on disk as long as the container is: it is started again by
that, whatever the caller's environment is then.

Beside the request is what the container has of the host: its image, and the disk over which its own files lie.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from katapod.host.state import write_atomically
from katapod.model.errors import InvalidState, KatapodError
from katapod.model.json_text import decode_json, encode_json
from katapod.model.layout import Layout, SandboxPaths
from katapod.supervisor.run_request import RunRequest

if TYPE_CHECKING:  # `start` of what runs already, and rename, do without
    from katapod.images import ImageStore
    from katapod.model.image import ImageRecord
    from katapod.sandbox.container import ContainerPlan

__all__ = ["DiskMark", "KeptRequest", "held_image", "keep_planned", "keep_request", "kept_disk", "mark_of", "read_kept"]


class DiskMark(Struct, frozen=True):
    """A disk, and what tells it from one that was made anew: blocks of an overlay fit no other."""

    path: str
    size_bytes: int
    mtime_ns: int


class KeptRequest(Struct, frozen=True):
    """`image_digest`: held for the container; empty: it has none. `disk`: None until one was used."""

    request: RunRequest
    image_digest: str = ""
    disk: DiskMark | None = None
    version: int = 1

    @property
    def again(self) -> RunRequest:
        """What starts it again."""
        return replace(self.request, again=True, image_digest=self.image_digest)


def mark_of(path: Path) -> DiskMark:
    """Raises KatapodError."""
    try:
        found = os.stat(path)
    except OSError as exc:
        raise KatapodError(f"cannot use the disk {path}: {exc.strerror}") from exc
    return DiskMark(str(path), found.st_size, found.st_mtime_ns)


def keep_request(layout: Layout, kept: KeptRequest) -> None:
    """Raises NoSpace, KatapodError."""
    paths = layout.sandbox(kept.request.container_id)
    try:
        paths.data.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise KatapodError(f"cannot make {paths.data}: {exc.strerror}") from exc
    once = replace(kept.request, again=False, restarts=0, replace=False, cid_file=None, image_digest="")
    write_atomically(paths.kept_request, encode_json(replace(kept, request=once)))


def keep_planned(layout: Layout, request: RunRequest, plan: "ContainerPlan") -> None:
    """That of a container which is about to be made. Raises NoSpace, KatapodError."""
    disk = mark_of(plan.rootfs.disk) if plan.rootfs.disk is not None else None
    keep_request(layout, KeptRequest(request, plan.image_digest, disk))


def read_kept(layout: Layout, container_id: str) -> KeptRequest:
    """Raises InvalidState if there is none, KatapodError."""
    path = layout.sandbox(container_id).kept_request
    try:
        return decode_json(path.read_bytes(), KeptRequest)
    except FileNotFoundError as exc:
        raise InvalidState(
            f"cannot start container {container_id}: nothing was kept to start it again by",
            hint=f"an earlier version has made it, or an engine: kata-runtime delete {container_id}, and run it again",
        ) from exc
    except OSError as exc:
        raise KatapodError(f"cannot read {path}: {exc.strerror}") from exc
    except msgspec.DecodeError as exc:
        raise KatapodError(f"cannot read {path}: {exc}", hint=f"kata-runtime delete --force {container_id}") from exc


async def held_image(store: "ImageStore", request: RunRequest) -> "ImageRecord":
    """The image that the container has had from the start. Raises ImageNotFound, StoreDamaged."""
    await store.hold(request.image_digest, request.sandbox_id)
    return await store.by_digest(request.image_digest)


def kept_disk(layout: Layout, container_id: str) -> tuple[bool, Path | None]:
    """Whether there are files of an earlier start, and the disk that they lie over; None: they lie over a directory.

    Raises KatapodError if that disk is not there any more.
    """
    paths = layout.sandbox(container_id)
    if (paths.files / "upper").exists():
        return True, None
    if not (paths.files / "root.qcow2").exists():
        return False, None
    return True, _same_disk(layout, container_id, paths)


def _same_disk(layout: Layout, container_id: str, paths: SandboxPaths) -> Path:
    mark = read_kept(layout, container_id).disk
    if mark is None or mark_of(Path(mark.path)) != mark:
        raise KatapodError(
            f"cannot start container {container_id}: its files lie over a disk of its image that was made anew since",
            hint=f"kata-runtime delete {container_id}, and run it again; its volumes stay",
        )
    return Path(mark.path)
