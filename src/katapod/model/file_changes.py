"""What has become other between two trees of files, as `docker diff` tells it. Pure."""

import posixpath
from collections.abc import Collection, Mapping
from typing import Literal

from msgspec import Struct

__all__ = ["Change", "FileEntry", "file_changes"]


class FileEntry(Struct, frozen=True):
    """What is compared of a file. `kind`: the type bits of its mode (inode(7)). `size` and `mtime_s` are 0 for whatever
    is no regular file; `target`: of a symbolic link, or the numbers of a device."""

    kind: int
    mode: int
    uid: int
    gid: int
    size: int = 0
    mtime_s: int = 0
    target: str = ""


class Change(Struct, frozen=True, order=True):
    path: str
    kind: Literal["A", "C", "D"]  # added, changed, deleted


def file_changes(
    before: Mapping[str, FileEntry], after: Mapping[str, FileEntry], left_out: Collection[str] = ()
) -> list[Change]:
    """By path. Paths have no slash at either end. What is at or below those of `left_out` is not compared.

    The times of a directory do not count: it has changed if something in it has, or its mode or owner. Of a directory
    that has gone only itself is told.
    """
    found = dict[str, Change]()
    for path in sorted({*before, *after}):
        if not path or any(path == one or path.startswith(f"{one}/") for one in left_out):
            continue
        parent = posixpath.dirname(path)
        old, new = before.get(path), after.get(path)
        if old == new:
            continue
        found[path] = Change(path, "A" if old is None else "D" if new is None else "C")
        while parent and parent not in found:
            found[parent] = Change(parent, "C")
            parent = posixpath.dirname(parent)
    gone = {path for path, change in found.items() if change.kind == "D"}
    return sorted(change for path, change in found.items() if posixpath.dirname(path) not in gone)
