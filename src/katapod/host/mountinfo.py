"""What is mounted, by the kernel's list. Loads next to nothing: the shim's `delete` asks it, for which engines wait."""

import os
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["MountEntry", "mounts_below", "read_mounts"]


class MountEntry(NamedTuple):
    """A mount: where it is, and what."""

    point: str
    fstype: str
    source: str
    read_only: bool


def mounts_below(directory: str | os.PathLike[str]) -> list[str]:
    """Mount points at or below `directory`, newest first. Source: proc(5), mountinfo."""
    prefix = os.path.realpath(directory)  # mountinfo knows no symbolic links
    found = [each.point for each in read_mounts() if each.point == prefix or each.point.startswith(prefix + "/")]
    found.reverse()
    return found


def read_mounts(process: int | str = "thread-self") -> Iterator[MountEntry]:
    """The mounts that a process, or the calling thread, sees, oldest first. Raises OSError. Source: proc(5)."""
    with open(f"/proc/{process}/mountinfo", "rb") as handle:
        for line in handle:
            fields, _, rest = line.partition(b" - ")
            words = fields.split(b" ")
            point, options = os.fsdecode(_unescape(words[4])), words[5].split(b",")
            fstype, source = (os.fsdecode(_unescape(word)) for word in rest.split(b" ")[:2])
            yield MountEntry(point, fstype, source, b"ro" in options)


def _unescape(field: bytes) -> bytes:
    """mountinfo writes blank, tab, newline and backslash as octal."""
    if b"\\" not in field:
        return field
    for escaped, char in ((b"\\040", b" "), (b"\\011", b"\t"), (b"\\012", b"\n"), (b"\\134", b"\\")):
        field = field.replace(escaped, char)
    return field
