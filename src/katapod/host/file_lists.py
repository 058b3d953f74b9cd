"""Trees of files as values: of a directory of this host, and of a tar from a container, which is not to be trusted."""

import os
import posixpath
import stat
import tarfile
from pathlib import Path
from typing import BinaryIO

from katapod.model.errors import KatapodError
from katapod.model.file_changes import FileEntry

__all__ = ["ENTRIES_MAX", "entries_of_tar", "entries_of_tree"]

ENTRIES_MAX = 4_000_000
"""Of an archive: some GiB of memory, which a container may not have of the host."""

KINDS = {
    tarfile.REGTYPE: stat.S_IFREG,
    tarfile.AREGTYPE: stat.S_IFREG,
    tarfile.CONTTYPE: stat.S_IFREG,
    tarfile.GNUTYPE_SPARSE: stat.S_IFREG,
    tarfile.DIRTYPE: stat.S_IFDIR,
    tarfile.SYMTYPE: stat.S_IFLNK,
    tarfile.FIFOTYPE: stat.S_IFIFO,
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
}


def entries_of_tree(root: Path) -> dict[str, FileEntry]:
    """All below `root`, by the path from there. Sockets are left out: no tar has them. Raises KatapodError."""
    found = dict[str, FileEntry]()

    def fail(exc: OSError) -> None:
        raise KatapodError(f"cannot read {exc.filename}: {exc.strerror}") from exc

    for directory, directories, files in os.walk(root, onerror=fail):
        for name in (*directories, *files):
            path = os.path.join(directory, name)
            seen = os.lstat(path)
            kind = stat.S_IFMT(seen.st_mode)
            if kind == stat.S_IFSOCK:
                continue
            regular = kind == stat.S_IFREG
            target = os.readlink(path) if kind == stat.S_IFLNK else _numbers(kind, seen.st_rdev)
            found[os.path.relpath(path, root)] = FileEntry(
                kind,
                # a link's mode is of no use, and tar's differ in it
                0 if kind == stat.S_IFLNK else stat.S_IMODE(seen.st_mode),
                seen.st_uid,
                seen.st_gid,
                seen.st_size if regular else 0,
                int(seen.st_mtime) if regular else 0,
                target,
            )
    return found


def _numbers(kind: int, device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}" if kind in (stat.S_IFCHR, stat.S_IFBLK) else ""


def entries_of_tar(stream: BinaryIO) -> dict[str, FileEntry]:
    """All members, by their paths without a slash at either end. Raises KatapodError."""
    found = dict[str, FileEntry]()
    try:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                archive.members.clear()  # type: ignore[attr-defined]  # which would keep all
                path = posixpath.normpath(member.name).strip("/")
                if path == ".":
                    continue
                if len(found) >= ENTRIES_MAX:
                    raise KatapodError("cannot compare the container's files: there are too many")
                found[path] = _entry(member, found)
    except (OSError, tarfile.TarError, KeyError) as exc:
        raise KatapodError(f"cannot read the container's files: {exc}") from exc
    return found


def _entry(member: tarfile.TarInfo, found: dict[str, FileEntry]) -> FileEntry:
    """A hard link is another name of what came before. Raises KeyError if nothing did."""
    if member.islnk():
        return found[posixpath.normpath(member.linkname).strip("/")]
    kind = KINDS.get(member.type, 0)
    regular = kind == stat.S_IFREG
    return FileEntry(
        kind,
        0 if member.issym() else member.mode & 0o7777,
        member.uid,
        member.gid,
        member.size if regular else 0,
        int(member.mtime) if regular else 0,
        member.linkname
        if member.issym()
        else f"{member.devmajor}:{member.devminor}"
        if member.isdev() and kind != stat.S_IFIFO
        else "",
    )
