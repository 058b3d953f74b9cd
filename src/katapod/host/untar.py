"""Files between this host and a stream in tar's format whose other end is a container.

What comes from there is not to be trusted: a member is made only at its own place below the directory that was named,
never through a link, with no rights beyond reading, writing and executing, and never as a device.
"""

import contextlib
import os
import shutil
import stat
import tarfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import BinaryIO

from katapod.model.errors import KatapodError

__all__ = ["copy_without", "pack", "unpack"]

BLOCK = 1 << 20


def pack(source: Path, name: str, out: BinaryIO, *, follow_links: bool = False) -> None:
    """Write a file or tree as members `name` and NAME/...; "." is what is in a directory. Raises KatapodError."""
    try:
        with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT, dereference=follow_links) as archive:
            archive.add(source, name)
    except BrokenPipeError:
        return  # who reads it says why
    except (OSError, tarfile.TarError) as exc:
        raise KatapodError(f"cannot copy {source}: {exc}") from exc


def unpack(stream: BinaryIO, place: Path, name: str, rename: str = "") -> int:
    """Make what the stream has of `name`, "." for all, below the directory `place`, as `rename` if that is given;
    returns the number of members.

    Raises KatapodError for a member that is not below `name`, or that would lead out of `place`.
    """
    times = list[tuple[Path, float]]()
    count = 0
    try:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                target = _target(place, member.name, name, rename)
                count += 1
                if target != place:
                    _make(archive, member, target, lambda text: _target(place, text, name, rename))
                if member.isdir():
                    times.append((target, member.mtime))
    except (OSError, tarfile.TarError) as exc:
        raise KatapodError(f"cannot copy to {place}: {exc}") from exc
    for directory, mtime in reversed(times):
        with contextlib.suppress(OSError):
            os.utime(directory, (mtime, mtime))
    return count


def copy_without(stream: BinaryIO, out: BinaryIO, left_out: Collection[str]) -> None:
    """Pass an archive on, but for what is below the paths `left_out`, which have no slash at either end. Raises
    KatapodError."""
    try:
        with (
            tarfile.open(fileobj=stream, mode="r|") as archive,
            tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as copy,
        ):
            for member in archive:
                if not any(member.name.startswith(f"{path}/") for path in left_out):
                    copy.addfile(member, archive.extractfile(member) if member.isreg() else None)
    except (OSError, tarfile.TarError) as exc:
        raise KatapodError(f"cannot copy the container's files: {exc}") from exc


def _target(place: Path, member: str, name: str, rename: str) -> Path:
    """Where a member goes. Raises KatapodError."""
    parts = [part for part in member.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in member:
        raise KatapodError(f"cannot copy {member[:200]!r}: it leads out of the directory")
    if name != ".":
        if parts[:1] != [name]:
            raise KatapodError(f"cannot copy {member[:200]!r}: it is not below {name}, which was asked for")
        parts[0] = rename or name
    target = place
    for part in parts:
        if target != place and target.is_symlink():
            raise KatapodError(f"cannot copy {member[:200]!r}: it leads through a link")
        target = target / part
    return target


def _make(archive: tarfile.TarFile, member: tarfile.TarInfo, target: Path, find: Callable[[str], Path]) -> None:
    """Raises OSError, KatapodError."""
    if member.isdir():
        if target.is_symlink() or (target.exists() and not target.is_dir()):
            target.unlink()
        target.mkdir(exist_ok=True)
        target.chmod(member.mode & 0o777)
        return
    if target.is_dir() and not target.is_symlink():
        raise KatapodError(f"cannot copy {member.name[:200]!r}: {target} is a directory")
    target.unlink(missing_ok=True)
    if member.isreg():
        source = archive.extractfile(member)
        assert source is not None
        with open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as copy:
            shutil.copyfileobj(source, copy, BLOCK)
            os.fchmod(copy.fileno(), member.mode & 0o777)
        os.utime(target, (member.mtime, member.mtime))
    elif member.issym():
        os.symlink(member.linkname, target)
    elif member.islnk():
        other = find(member.linkname)
        if not stat.S_ISREG(os.lstat(other).st_mode):
            raise KatapodError(f"cannot copy {member.name[:200]!r}: it is a link to what is no file")
        os.link(other, target)
    elif member.isfifo():
        os.mkfifo(target, member.mode & 0o777)
    else:
        raise KatapodError(f"cannot copy {member.name[:200]!r}: devices are not copied")
