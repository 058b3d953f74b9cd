"""The files that announce direct volumes, and the marks of the sandboxes that use them.

They lie in /run/kata-containers/shared/direct-volumes, a directory for each volume. Source: Kata
Containers, docs/design/direct-blk-device-assignment.md.
"""

import contextlib
import os
import shutil
from pathlib import Path

from katapod.host.state import supervisor_alive, write_atomically
from katapod.model.direct_volume import MountInfo, parse_mount_info, volume_name
from katapod.model.errors import InvalidState, KatapodError, NotFound
from katapod.model.layout import Layout

__all__ = [
    "add_volume",
    "forget_volumes",
    "mark_volume",
    "sandbox_of_volume",
    "read_volume",
    "remove_volume",
    "size_of_device",
    "unmark_volume",
]

INFO = "mountInfo.json"


def _directory(layout: Layout, volume_path: str) -> Path:
    return _root(layout) / volume_name(volume_path)


def _root(layout: Layout) -> Path:
    return layout.share_root.parent / "direct-volumes"


def add_volume(layout: Layout, volume_path: str, text: bytes) -> None:
    """Announce a volume, or announce it anew. Raises SpecError, UsageError, KatapodError."""
    directory = _directory(layout, volume_path)
    parse_mount_info(text, "the mount info")
    try:
        directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
    except OSError as exc:
        raise KatapodError(f"cannot make {directory}: {exc.strerror}") from exc
    write_atomically(directory / INFO, text)
    (directory / INFO).chmod(0o600)


def remove_volume(layout: Layout, volume_path: str) -> None:
    """Idempotent, as storage drivers want it. Raises UsageError, KatapodError."""
    directory = _directory(layout, volume_path)
    try:
        shutil.rmtree(directory)
    except FileNotFoundError:
        return
    except OSError as exc:
        raise KatapodError(f"cannot remove {directory}: {exc.strerror}") from exc


def read_volume(layout: Layout, path: str) -> MountInfo | None:
    """None if `path` is no direct volume. Raises SpecError, KatapodError."""
    if not os.path.isdir(_root(layout)) or len(path) > 190:  # a longer path cannot have such a file
        return None
    where = _directory(layout, path) / INFO
    try:
        data = where.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise KatapodError(f"cannot read {where}: {exc.strerror}") from exc
    return parse_mount_info(data, f"{where}, the direct volume {path}")


def mark_volume(layout: Layout, volume_path: str, sandbox_id: str) -> None:
    """Note whose the volume is. A file system is no two guests' at once: raises InvalidState if another one has it."""
    directory = _directory(layout, volume_path)
    for name in _marks(directory):
        if name != sandbox_id and supervisor_alive(layout.sandbox(name)):
            raise InvalidState(f"cannot use the direct volume {volume_path}: sandbox {name} has it")
    for name in _marks(directory):
        (directory / name).unlink(missing_ok=True)
    (directory / sandbox_id).touch(mode=0o600)


def size_of_device(device: str) -> int:
    """Of a file or a block device, bytes. Raises KatapodError."""
    try:
        with open(device, "rb") as handle:
            return handle.seek(0, os.SEEK_END)
    except OSError as exc:
        raise KatapodError(f"cannot read the size of {device}: {exc.strerror}") from exc


def unmark_volume(layout: Layout, volume_path: str, sandbox_id: str) -> None:
    (_directory(layout, volume_path) / sandbox_id).unlink(missing_ok=True)


def sandbox_of_volume(layout: Layout, volume_path: str) -> str:
    """The sandbox that uses the volume. Raises NotFound, UsageError."""
    directory = _directory(layout, volume_path)
    if not (directory / INFO).exists():
        raise NotFound(f"cannot find the direct volume {volume_path}", hint="see: kata-runtime direct-volume add")
    marks = _marks(directory)
    if not marks:
        raise NotFound(f"cannot find a sandbox that uses the direct volume {volume_path}")
    return marks[0]


def _marks(directory: Path) -> list[str]:
    return sorted(name for name in os.listdir(directory) if name != INFO and not name.startswith("."))


def forget_volumes(layout: Layout, sandbox_id: str) -> None:
    """Take away the marks of a sandbox that has ended."""
    directories: list[Path] = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # most hosts have no such volumes
        directories = list(_root(layout).iterdir())
    for directory in directories:
        with contextlib.suppress(NotADirectoryError):  # a stray file is no mark
            (directory / sandbox_id).unlink(missing_ok=True)
