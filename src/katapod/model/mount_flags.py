"""Values of the flags of `run` that mount something, in the syntax that users of `docker run` know. Pure."""

import posixpath
import re

from msgspec import Struct

from katapod.model import oci
from katapod.model.flags import parse_size, refuse
from katapod.model.text import need_text

__all__ = [
    "DeviceRequest",
    "NamedVolume",
    "TmpfsMount",
    "Volume",
    "parse_device",
    "parse_mount",
    "parse_tmpfs",
    "parse_volume",
    "parse_volume_name",
    "tidy_volume",
]


class Volume(Struct, frozen=True, kw_only=True):
    """A bind mount of a host path. Both paths are absolute and have no ".." component."""

    source: str
    destination: str
    read_only: bool = False


class NamedVolume(Struct, frozen=True, kw_only=True):
    """A volume of Katapod's store (host/volumes.py), which makes it if it is not there. Without a `name` it is a new
    one. `copy`: an empty one is filled with what the image has at `destination`."""

    name: str
    destination: str
    read_only: bool = False
    copy: bool = True


class DeviceRequest(Struct, frozen=True, kw_only=True):
    """A device of the host, and where the container has it. `access`: of r, w and m."""

    source: str
    destination: str
    access: str = "rwm"


class TmpfsMount(Struct, frozen=True, kw_only=True):
    """A tmpfs in the container; `options` as mount(8) takes them."""

    destination: str
    options: tuple[str, ...]


_VOLUME_EXAMPLE = "/srv/data:/data:ro"
_NO_EFFECT = frozenset({"rw", "ro", "z", "Z", "nocopy", "bind", "rbind", "private", "rprivate", "cached", "delegated"})
"""Options that are honoured, or that ask for what happens anyway: z and Z relabel for SELinux, which does
not see through a VM; consistency modes are for Docker Desktop."""
_PROPAGATION = frozenset({"shared", "rshared", "slave", "rslave"})


_VOLUME_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}")


def parse_volume_name(text: str, flag: str = "--volume") -> str:
    """The name of a volume: safe as one component of a path. The rule is Docker's."""
    if not _VOLUME_NAME.fullmatch(text):
        refuse(flag, text, "it is not a name: a letter or digit, then letters, digits, '_', '.', '-'", "data")
    return text


def parse_volume(text: str, cwd: str, flag: str = "-v") -> Volume | NamedVolume:
    """[SRC:]DST[:OPTION,...]. SRC is absolute, or begins with "." and is relative to `cwd`, or is the name of a volume.
    Colons cannot be part of a path, as in Docker."""
    parts = text.split(":")
    if len(parts) > 3:
        refuse(flag, text, "it has more than three parts between colons", _VOLUME_EXAMPLE)
    if len(parts) == 1:
        return NamedVolume(name="", destination=_destination(flag, text, text, _VOLUME_EXAMPLE))
    source, destination, options = parts[0], parts[1], parts[2].split(",") if len(parts) == 3 else []
    if not source:
        refuse(flag, text, "the source is empty", _VOLUME_EXAMPLE)
    for option in options:
        if option in _PROPAGATION:
            refuse(flag, text, f"{option}: mounts made later cannot propagate into a VM", _VOLUME_EXAMPLE)
        if option not in _NO_EFFECT:
            refuse(flag, text, f"unknown option {option!r}", _VOLUME_EXAMPLE)
    if "ro" in options and "rw" in options:
        refuse(flag, text, "it cannot be both ro and rw", _VOLUME_EXAMPLE)
    place, read_only = _destination(flag, text, destination, _VOLUME_EXAMPLE), "ro" in options
    if source.startswith("."):
        source = f"{cwd}/{source}"
    elif not source.startswith("/"):
        if not _VOLUME_NAME.fullmatch(source):
            refuse(
                flag,
                text,
                f"{source!r} is neither the name of a volume nor a path; for a directory write ./{source}",
                _VOLUME_EXAMPLE,
            )
        return NamedVolume(name=source, destination=place, read_only=read_only, copy="nocopy" not in options)
    return Volume(source=_tidy(source), destination=place, read_only=read_only)


_MOUNT_EXAMPLE = "type=bind,source=/srv/data,target=/data,readonly"
_MOUNT_TYPES = ("bind", "volume", "tmpfs")
_MOUNT_KEYS = {"src": "source", "dst": "target", "destination": "target", "ro": "readonly"}


def parse_mount(text: str, cwd: str, flag: str = "--mount") -> Volume | NamedVolume | TmpfsMount:
    """type=bind|volume|tmpfs,KEY[=VALUE],... as docker-run(1) has it; volume goes without saying."""
    words = dict[str, str]()
    for part in text.split(","):
        key, equals, value = part.partition("=")
        key = _MOUNT_KEYS.get(key.strip(), key.strip())
        words[key] = value if equals else "true"
    kind = words.pop("type", "volume")
    if kind not in _MOUNT_TYPES:
        refuse(flag, text, f"the type {kind!r} is none of {', '.join(_MOUNT_TYPES)}", _MOUNT_EXAMPLE)
    target = words.pop("target", "")
    if not target:
        refuse(flag, text, "it has no target", _MOUNT_EXAMPLE)
    place = _destination(flag, text, target, _MOUNT_EXAMPLE)
    read_only = _truth(flag, text, "readonly", words.pop("readonly", "false"))
    source = words.pop("source", "")
    if kind == "tmpfs":
        return _tmpfs_mount(flag, text, place, source, read_only, words)
    if kind == "bind":
        found: Volume | NamedVolume = _bind_mount(flag, text, cwd, source, place, read_only, words)
    else:
        copy = not _truth(flag, text, "volume-nocopy", words.pop("volume-nocopy", "false"))
        if words.pop("volume-driver", "local") != "local":
            refuse(flag, text, "volumes have the driver local only", "type=volume,source=data,target=/data")
        if source and not _VOLUME_NAME.fullmatch(source):
            refuse(flag, text, f"{source!r} is not the name of a volume", _MOUNT_EXAMPLE)
        found = NamedVolume(name=source, destination=place, read_only=read_only, copy=copy)
    if words:
        refuse(flag, text, f"unknown key {next(iter(words))!r} for the type {kind}", _MOUNT_EXAMPLE)
    return found


def _bind_mount(
    flag: str, text: str, cwd: str, source: str, place: str, read_only: bool, words: dict[str, str]
) -> Volume:
    if not source:
        refuse(flag, text, "a bind mount needs a source", _MOUNT_EXAMPLE)
    propagation = words.pop("bind-propagation", "rprivate")
    if propagation not in ("private", "rprivate"):
        refuse(flag, text, f"{propagation}: mounts made later cannot propagate into a VM", _MOUNT_EXAMPLE)
    if words.pop("consistency", "default") not in ("default", "consistent", "cached", "delegated"):
        refuse(flag, text, "it has no consistency that Docker knows", _MOUNT_EXAMPLE)
    if words.pop("bind-recursive", "enabled") != "enabled":
        refuse(flag, text, "what is mounted below a source is always mounted with it", _MOUNT_EXAMPLE)
    return Volume(
        source=_tidy(source if source.startswith("/") else f"{cwd}/{source}"), destination=place, read_only=read_only
    )


def _tmpfs_mount(flag: str, text: str, place: str, source: str, read_only: bool, words: dict[str, str]) -> TmpfsMount:
    if source:
        refuse(flag, text, "a tmpfs has no source", "type=tmpfs,target=/tmp,tmpfs-size=64m")
    options = ["ro"] if read_only else []
    if "tmpfs-size" in words:
        options.append(f"size={parse_size(words.pop('tmpfs-size'), flag)}")
    if "tmpfs-mode" in words:
        mode = words.pop("tmpfs-mode")
        if not _TMPFS_VALUES["mode"].fullmatch(mode):
            refuse(flag, text, f"{mode!r} is not a mode", "type=tmpfs,target=/tmp,tmpfs-mode=1777")
        options.append(f"mode={mode}")
    if words:
        refuse(flag, text, f"unknown key {next(iter(words))!r} for the type tmpfs", "type=tmpfs,target=/tmp")
    return parse_tmpfs(f"{place}:{','.join(options)}" if options else place, flag)


def _truth(flag: str, text: str, key: str, value: str) -> bool:
    if value not in ("true", "false", "1", "0"):
        refuse(flag, text, f"{key} is neither true nor false", _MOUNT_EXAMPLE)
    return value in ("true", "1")


def parse_device(text: str, flag: str = "--device") -> DeviceRequest:
    """HOST[:CONTAINER][:rwm]."""
    parts = text.split(":")
    source, *rest = parts
    access = "rwm"
    if rest and re.fullmatch(r"[rwm]{1,3}", rest[-1]):
        access = rest.pop()
    if not source.startswith("/") or len(rest) > 1:
        refuse(flag, text, "it is not HOST[:CONTAINER][:rwm] with absolute paths", "/dev/fuse")
    destination = _destination(flag, text, rest[0] if rest else source, "/dev/fuse")
    return DeviceRequest(source=_tidy(source), destination=destination, access=access)


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
