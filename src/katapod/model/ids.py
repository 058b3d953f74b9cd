"""Names and ids of containers and sandboxes. A sandbox started for one container has its id."""

import os
import re
from collections.abc import Callable
from typing import NewType

from katapod.model.errors import UsageError

__all__ = [
    "MAX_ID_LENGTH",
    "SHORT_ID_LENGTH",
    "ContainerId",
    "name_or_new",
    "new_id",
    "parse_container_name",
    "short_id",
]

ContainerId = NewType("ContainerId", str)
"""A checked id or name: safe as one component of a path and as a word of a command line."""

MAX_ID_LENGTH = 64
"""Characters. Ids are part of socket paths, which Linux limits to 107 bytes (sun_path, unix(7)). The
longest of ours is /run/vc/vm/ID/extra-monitor.sock: 30 bytes and the id. 64 leaves room for later
files and equals the length of the ids that containerd and Docker make."""

RESERVED = frozenset({"template"})
"""Names that have another meaning beside the sandboxes' directories: /run/vc/vm/template, upstream's path."""

SHORT_ID_LENGTH = 12
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+")


def parse_container_name(text: str) -> ContainerId:
    """Check a name given by a caller. Raises UsageError.

    The rule is the one of Docker and of upstream's kata-runtime: it excludes "/", "." and "..", so
    that no name can lead out of a state directory.
    """
    shown = repr(text if len(text) <= MAX_ID_LENGTH else text[:20] + "...")
    if not text:
        raise UsageError("cannot use '' as a container name: it is empty", hint=_RULE)
    if len(text) > MAX_ID_LENGTH:
        raise UsageError(
            f"cannot use {shown} as a container name: it has {len(text)} characters, at most {MAX_ID_LENGTH} fit",
            hint="names are part of socket paths, which Linux limits to 107 bytes",
        )
    if "/" in text:
        raise UsageError(f"cannot use {shown} as a container name: it has a slash", hint=_RULE)
    if not _NAME.fullmatch(text):
        cause = "it is too short" if _NAME.fullmatch(text + "x") else "it has characters that are not allowed"
        raise UsageError(f"cannot use {shown} as a container name: {cause}", hint=_RULE)
    if text in RESERVED:
        raise UsageError(f"cannot use {shown} as a container name: templates of virtual machines lie there")
    return ContainerId(text)


def name_or_new(text: str) -> ContainerId:
    """The name that a caller gives; a random one if that is empty. Raises UsageError."""
    return parse_container_name(text) if text else ContainerId(short_id(new_id()))


_RULE = "use a letter or digit, then at least one more of letters, digits, '_', '.', '-'"


def new_id(random_bytes: Callable[[int], bytes] = os.urandom) -> ContainerId:
    """Make a new id: 64 hexadecimal digits of which the first 12 are not all decimal, as Docker does,
    because the short form serves as a host name and some programs take such a name for a number."""
    while True:
        found = random_bytes(MAX_ID_LENGTH // 2).hex()
        if not found[:SHORT_ID_LENGTH].isdigit():
            return ContainerId(found)


def short_id(container_id: str) -> str:
    """The form for people: the default name and host name of a container."""
    return container_id[:SHORT_ID_LENGTH]
