"""Values of the flags of `run` that mount something, in the syntax that users of `docker run` know. Pure."""

import posixpath
import re

from msgspec import Struct

from katapod.model import oci
from katapod.model.flags import refuse
from katapod.model.text import need_text

__all__ = ["TmpfsMount", "Volume", "parse_tmpfs", "parse_volume", "tidy_volume"]


class Volume(Struct, frozen=True, kw_only=True):
    """A bind mount of a host path. Both paths are absolute and have no ".." component."""

    source: str
    destination: str
    read_only: bool = False


class TmpfsMount(Struct, frozen=True, kw_only=True):
    """A tmpfs in the container; `options` as mount(8) takes them."""

    destination: str
    options: tuple[str, ...]


_VOLUME_EXAMPLE = "/srv/data:/data:ro"
_NO_EFFECT = frozenset({"rw", "ro", "z", "Z", "nocopy", "bind", "rbind", "private", "rprivate", "cached", "delegated"})
"""Options that are honoured, or that ask for what happens anyway: z and Z relabel for SELinux, which does
not see through a VM; copying is for named volumes only; consistency modes are for Docker Desktop."""
_PROPAGATION = frozenset({"shared", "rshared", "slave", "rslave"})


def parse_volume(text: str, cwd: str, flag: str = "-v") -> Volume:
    """SRC:DST[:OPTION,...]. SRC is absolute, or begins with "." and is relative to `cwd`. Colons cannot
    be part of a path, as in Docker."""
    parts = text.split(":")
    if len(parts) == 1:
        refuse(flag, text, "volumes without a source are not supported, give SRC:DST", _VOLUME_EXAMPLE)
    if len(parts) > 3:
        refuse(flag, text, "it has more than three parts between colons", _VOLUME_EXAMPLE)
    source, destination, options = parts[0], parts[1], parts[2].split(",") if len(parts) == 3 else []
    if not source:
        refuse(flag, text, "the source is empty", _VOLUME_EXAMPLE)
    if source.startswith("."):
        source = f"{cwd}/{source}"
    elif not source.startswith("/"):
        refuse(
            flag,
            text,
            f"named volumes are not supported; for a directory write /.../{source} or ./{source}",
            _VOLUME_EXAMPLE,
        )
    for option in options:
        if option in _PROPAGATION:
            refuse(flag, text, f"{option}: mounts made later cannot propagate into a VM", _VOLUME_EXAMPLE)
        if option not in _NO_EFFECT:
            refuse(flag, text, f"unknown option {option!r}", _VOLUME_EXAMPLE)
    if "ro" in options and "rw" in options:
        refuse(flag, text, "it cannot be both ro and rw", _VOLUME_EXAMPLE)
    return Volume(
        source=_tidy(source),
        destination=_destination(flag, text, destination, _VOLUME_EXAMPLE),
        read_only="ro" in options,
    )


def tidy_volume(volume: Volume, flag: str = "-v") -> Volume:
    """One that was given as a value: its source may have colons. Raises UsageError."""
    shown = f"{volume.source}:{volume.destination}"
    if not volume.source.startswith("/") or "\0" in volume.source:
        refuse(flag, shown, "the source is not an absolute path", _VOLUME_EXAMPLE)
    return Volume(
        source=_tidy(volume.source),
        destination=_destination(flag, shown, volume.destination, _VOLUME_EXAMPLE),
        read_only=volume.read_only,
    )


_TMPFS_EXAMPLE = "/tmp:size=64m,mode=1777"  # noqa: S108 - a path inside the container
_TMPFS_WORDS = frozenset(
    {"ro", "rw", "suid", "nosuid", "dev", "nodev", "exec", "noexec", "sync", "async", "dirsync", "mand", "nomand"}
    | {"atime", "noatime", "diratime", "nodiratime", "relatime", "norelatime", "strictatime", "nostrictatime"}
)
_TMPFS_VALUES = {
    "size": re.compile(r"[0-9]+[kmgKMG]?|[0-9]{1,3}%"),
    "mode": re.compile(r"[0-7]{1,5}"),
    "uid": re.compile(r"[0-9]{1,10}"),
    "gid": re.compile(r"[0-9]{1,10}"),
    "nr_inodes": re.compile(r"[0-9]+[kmgKMG]?"),
    "nr_blocks": re.compile(r"[0-9]+[kmgKMG]?"),
}


def parse_tmpfs(text: str, flag: str = "--tmpfs") -> TmpfsMount:
    """/PATH[:OPTION,...]. nosuid, nodev and noexec hold unless the options say otherwise."""
    path, _, given = text.partition(":")
    options = ["noexec", "nosuid", "nodev"]
    for option in given.split(",") if given else []:
        name, equals, value = option.partition("=")
        if equals and name in _TMPFS_VALUES:
            if not _TMPFS_VALUES[name].fullmatch(value):
                refuse(flag, text, f"{option!r} has no value that tmpfs understands", _TMPFS_EXAMPLE)
            options = [one for one in options if not one.startswith(f"{name}=")]
        elif equals or name not in _TMPFS_WORDS:
            refuse(flag, text, f"unknown option {option!r}", _TMPFS_EXAMPLE)
        else:
            opposite = {"ro": "rw", "rw": "ro"}.get(name) or (name[2:] if name.startswith("no") else f"no{name}")
            options = [one for one in options if one not in (opposite, name)]
        options.append(option)
    return TmpfsMount(destination=_destination(flag, text, path, _TMPFS_EXAMPLE), options=tuple(options))


def _tidy(path: str) -> str:
    """Remove "." and ".." and doubled slashes, by text alone."""
    return "/" + posixpath.normpath(path).lstrip("/")


def _destination(flag: str, text: str, path: str, example: str) -> str:
    if not path.startswith("/"):
        refuse(flag, text, f"the path in the container, {path!r}, is not absolute", example)
    if oci.has_parent_component(path):
        refuse(flag, text, "the path in the container has a '..' component", example)
    need_text(flag, path)
    tidy = _tidy(path)
    if tidy == "/":
        refuse(flag, text, "the container's root cannot be mounted over", example)
    if "\0" in text:
        refuse(flag, text, "it has a NUL character", example)
    return tidy
