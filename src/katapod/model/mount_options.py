"""Options of a bind mount that decide what may be written, and where.

Source: OCI runtime-spec, config.md, "Linux mount options"; mount_setattr(2).
"""

from collections.abc import Iterable
from enum import Enum

__all__ = ["Access", "is_recursive", "parse_access"]


class Access(Enum):
    """`TOP_READ_ONLY`: the file systems that are mounted below stay writable, as they are."""

    WRITABLE = "rw"
    TOP_READ_ONLY = "ro"
    READ_ONLY = "rro"


def parse_access(options: Iterable[str]) -> Access:
    """The later one of ro and rw counts, and after them the later one of rro and rrw, which go for the top too."""
    top, everywhere = False, None
    for option in options:
        if option in ("ro", "rw"):
            top = option == "ro"
        elif option in ("rro", "rrw"):
            everywhere = option == "rro"
    if everywhere is None:
        return Access.TOP_READ_ONLY if top else Access.WRITABLE
    return Access.READ_ONLY if everywhere else Access.WRITABLE


def is_recursive(options: Iterable[str]) -> bool:
    """Whether what is mounted below the source comes with it: with "rbind", and where there is neither."""
    words = set(options)
    return "rbind" in words or "bind" not in words
