"""Container images as values: references that people type, the OCI image config, records of the store.

Pure: text and bytes in, frozen values out. Names are keys of a map and are never used as a path, and still
they are held to the grammar of the registries, so that nobody has to wonder about `../` in one.

Sources: OCI image spec (config.md, image-index.md), distribution spec (names and tags),
containers-transports(5) for the transports of skopeo.
"""

import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from enum import Enum
from typing import Annotated

import msgspec

from katapod.model.errors import UsageError

__all__ = [
    "CONFIG_MAX_BYTES",
    "ImageConfig",
    "ImageParseError",
    "ImageRecord",
    "Platform",
    "SkopeoReference",
    "StoredName",
    "Transport",
    "find_name",
    "is_registry",
    "parse_digest",
    "parse_image_config",
    "parse_image_name",
    "parse_image_ref",
    "parse_platform",
    "remote_names",
    "suggest_name",
]

NAME_MAX = 255
REFERENCE_MAX = 4096 + NAME_MAX
CONFIG_MAX_BYTES = 4 * 1024 * 1024  # what registries accept for a manifest; real configs have a few KiB

_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_HOST = r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?"
_PATH = rf"{_COMPONENT}(?:/{_COMPONENT})*"
_TAG = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
_DIGEST = r"sha256:[0-9a-f]{64}"
_NAME_RE = re.compile(
    rf"(?:(?P<host>{_HOST})/)?(?P<path>{_PATH})(?::(?P<tag>{_TAG}))?(?:@(?P<digest>{_DIGEST}))?", re.ASCII
)
_DIGEST_RE = re.compile(_DIGEST, re.ASCII)
_FORMS = (
    "write a stored name (busybox, debian:12) or oci:PATH[:TAG], oci-archive:FILE[:TAG], "
    "docker-archive:FILE[:REF], dir:PATH, docker://HOST/NAME:TAG"
)


class ImageParseError(UsageError):
    """A text or document that is no image reference, name or config. `hint` says what would be."""


class Transport(Enum):
    """Where skopeo reads an image from; the value is its prefix in a reference."""

    OCI = "oci"
    OCI_ARCHIVE = "oci-archive"
    DOCKER_ARCHIVE = "docker-archive"
    DIR = "dir"
    DOCKER = "docker"


class StoredName(msgspec.Struct, frozen=True):
    """A name in the store, with its tag or digest always spelled out: `debian:12`."""

    text: str


class SkopeoReference(msgspec.Struct, frozen=True):
    """An image outside the store."""

    transport: Transport
    location: str
    """Path of the file or directory; for DOCKER the repository with its registry (`docker.io/library/x`)."""
    selector: str = ""
    """Tag, docker reference or `@index` within it; for DOCKER `:TAG` or `@DIGEST`."""

    def __str__(self) -> str:
        if self.transport is Transport.DOCKER:
            return f"docker://{self.location}{self.selector}"
        tail = f":{self.selector}" if self.selector else ""
        return f"{self.transport.value}:{self.location}{tail}"

    @property
    def registry(self) -> str:
        """Host and port of a DOCKER reference."""
        return self.location.partition("/")[0]

    def pinned(self, digest: str) -> "SkopeoReference":
        """The same DOCKER repository at exactly `digest`."""
        return SkopeoReference(self.transport, self.location, f"@{digest}")


class Platform(msgspec.Struct, frozen=True):
    """What an image is built for, in the words of the Go toolchain that OCI uses."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        variant = f"/{self.variant}" if self.variant else ""
        return f"{self.architecture}{variant}/{self.os}"

    def runs(self, image: "Platform") -> bool:
        """Whether `image` runs on this machine. An image that does not say is given the benefit of it."""
        return image.os in ("", self.os) and image.architecture in ("", self.architecture)


class ImageConfig(msgspec.Struct, frozen=True):
    """What an image asks of the runtime. Every field may be empty."""

    platform: Platform
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    working_dir: str = ""
    user: str = ""
    stop_signal: str = ""
    exposed_ports: tuple[str, ...] = ()
    volumes: tuple[str, ...] = ()
    labels: dict[str, str] = {}
    diff_ids: tuple[str, ...] = ()
    created: datetime | None = None


class ImageRecord(msgspec.Struct, frozen=True):
    """An image in the store, unpacked and ready."""

    digest: str
    """sha256 of its OCI config, which names every layer's content: the same image has one digest
    whatever registry or archive it came from."""
    names: tuple[str, ...]
    config: ImageConfig
    size_bytes: int
    """Disk space of the unpacked files."""
    created: datetime
    """When it was unpacked here."""
    source: str
    """The reference that it came from."""


_ARCHITECTURES = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "armv7l": "arm",
    "armv6l": "arm",
    "i386": "386",
    "i686": "386",
}


def parse_platform(machine: str) -> Platform:
    """Name the platform of a Linux machine from uname(2)'s `machine`; unlisted ones are the same in both."""
    return Platform("linux", _ARCHITECTURES.get(machine, machine))


def parse_digest(text: str) -> str:
    """Return the 64 hex digits of `sha256:...`."""
    if not _DIGEST_RE.fullmatch(text):
        raise ImageParseError(f"cannot use {text[:100]!r} as an image digest: it is not sha256: and 64 hex digits")
    return text.removeprefix("sha256:")


def parse_image_name(text: str) -> StoredName:
    """Parse the name of an image in the store; `latest` is the tag that goes without saying."""
    if len(text) > NAME_MAX:
        raise ImageParseError(
            f"cannot use an image name of {len(text)} characters: at most {NAME_MAX} are allowed", hint=_FORMS
        )
    match = _NAME_RE.fullmatch(text)
    if match is None:
        lower = _NAME_RE.fullmatch(text.lower())
        hint = "image names are in lower case" if lower else _FORMS
        raise ImageParseError(f"cannot use {text!r} as an image name: it is not NAME[:TAG]", hint=hint)
    named = text if match["tag"] or match["digest"] else f"{text}:latest"
    if len(named) > NAME_MAX:
        raise ImageParseError(f"cannot use {text!r} as an image name: too long with its tag, latest")
    return StoredName(named)


def parse_image_ref(text: str) -> StoredName | SkopeoReference:
    """Parse what a user typed as IMAGE. Raises ImageParseError."""
    if not text or len(text) > REFERENCE_MAX:
        raise ImageParseError(f"cannot use an image reference of {len(text)} characters", hint=_FORMS)
    if any(ord(char) < 32 or ord(char) == 127 for char in text):
        raise ImageParseError(f"cannot use image reference {text!r}: it has control characters", hint=_FORMS)
    prefix, colon, rest = text.partition(":")
    if prefix == "docker" and rest.startswith("//"):
        return _parse_docker(text, rest[2:])
    if rest.startswith("//"):
        raise ImageParseError(f"cannot use image reference {text!r}: unknown transport {prefix}://", hint=_FORMS)
    if colon and prefix in _FILE_TRANSPORTS:
        # As skopeo does: the path ends at the first colon, because a docker reference has colons too.
        location, _, selector = rest.partition(":")
        if not location:
            raise ImageParseError(f"cannot use image reference {text!r}: it has no path", hint=_FORMS)
        if selector and prefix == "dir":
            raise ImageParseError(f"cannot use image reference {text!r}: a dir: path has no tag", hint=_FORMS)
        return SkopeoReference(Transport(prefix), location, selector)
    if prefix in ("docker-daemon", "containers-storage", "ostree", "sif", "tarball"):
        raise ImageParseError(f"cannot use image reference {text!r}: {prefix}: is not supported", hint=_FORMS)
    return parse_image_name(text)


def is_registry(text: str) -> bool:
    """Whether it is HOST[:PORT][/PATH], where HOST looks like one: localhost, or with a dot or a port."""
    return _has_host(f"{text}/x") and _NAME_RE.fullmatch(f"{text}/x") is not None


def _has_host(name: str) -> bool:
    """`library/debian`: the first part is only a registry if it looks like one (as in docker and podman)."""
    first, slash, _ = name.partition("/")
    return bool(slash) and ("." in first or ":" in first or first == "localhost")


def remote_names(wanted: StoredName, registries: Iterable[str]) -> tuple[SkopeoReference, ...]:
    """Where a name may come from that is not stored: the registry that it begins with, else each of `registries`.
    Raises ImageParseError if a name becomes too long."""
    places = ("",) if _has_host(wanted.text) else tuple(f"{each}/" for each in registries)
    return tuple(_parse_docker(wanted.text, f"{place}{wanted.text}") for place in places)


_FILE_TRANSPORTS = frozenset(item.value for item in Transport if item is not Transport.DOCKER)


def _parse_docker(text: str, rest: str) -> SkopeoReference:
    match = _NAME_RE.fullmatch(rest) if len(rest) <= NAME_MAX else None
    if match is None:
        raise ImageParseError(f"cannot use image reference {text!r}: it is not docker://HOST/NAME[:TAG|@sha256:DIGEST]")
    host, path = match["host"], match["path"]
    if host is not None and not _has_host(f"{host}/"):
        host, path = None, f"{host}/{path}"
    if host is None:
        host = "docker.io"
    if host == "docker.io" and "/" not in path:
        path = f"library/{path}"
    selector = f"@{match['digest']}" if match["digest"] else f":{match['tag'] or 'latest'}"
    return SkopeoReference(Transport.DOCKER, f"{host}/{path}", selector)


def suggest_name(reference: SkopeoReference) -> StoredName:
    """The name an import gets when the user gives none. Raises ImageParseError if none can be made."""
    if reference.transport is Transport.DOCKER:
        return StoredName(f"{reference.location}{reference.selector}")
    if reference.transport is Transport.DOCKER_ARCHIVE and reference.selector.strip("@0123456789"):
        return parse_image_name(reference.selector)
    stem = reference.location.rstrip("/").rpartition("/")[2].lower()
    stem = re.sub(r"(\.(tar|tgz|gz|xz|bz2|zst|oci))+$", "", stem)
    stem = re.sub(r"[^a-z0-9]+", "-", stem).strip("-")
    tag = reference.selector if re.fullmatch(_TAG, reference.selector, re.ASCII) else "latest"
    try:
        return parse_image_name(f"{stem}:{tag}")
    except ImageParseError as exc:
        raise ImageParseError(f"cannot make a name out of {reference}", hint="give one with --name") from exc


def find_name(wanted: StoredName, names: Iterable[str]) -> tuple[str, ...]:
    """Names that `wanted` can mean: itself, else those that end in it.

    So `debian:12` finds docker.io/library/debian:12. More than one name in the answer: it is ambiguous.
    """
    known = sorted(names)
    if wanted.text in known:
        return (wanted.text,)
    return tuple(name for name in known if name.endswith(f"/{wanted.text}") and _NAME_RE.fullmatch(name))


_Text = Annotated[str, msgspec.Meta(max_length=1024 * 1024)]


class _RawExec(msgspec.Struct, rename="pascal"):
    """The `config` object. Go writes absent lists and maps as null; unknown keys are ignored (OCI spec)."""

    user: _Text | None = None
    exposed_ports: dict[str, msgspec.Raw] | None = None
    env: list[_Text] | None = None
    entrypoint: list[_Text] | None = None
    cmd: list[_Text] | None = None
    volumes: dict[str, msgspec.Raw] | None = None
    working_dir: _Text | None = None
    labels: dict[str, str | None] | None = None
    stop_signal: _Text | None = None


class _RawRootfs(msgspec.Struct):
    type: str
    diff_ids: list[str] | None = None


class _RawConfig(msgspec.Struct):
    rootfs: _RawRootfs
    architecture: str = ""
    os: str = ""
    variant: str = ""
    created: str | None = None
    config: _RawExec | None = None


def parse_image_config(data: bytes) -> ImageConfig:
    """Parse an OCI image config (also Docker's, a superset). Raises ImageParseError.

    The bytes come from strangers: bounded first, then parsed; strings that cannot be passed to execve(2)
    are refused here, once.
    """
    if len(data) > CONFIG_MAX_BYTES:
        raise ImageParseError(f"the image config has {len(data)} bytes, at most {CONFIG_MAX_BYTES} are allowed")
    try:
        raw = msgspec.json.decode(data, type=_RawConfig)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ImageParseError(f"the image config is not valid: {exc}") from exc
    if raw.rootfs.type != "layers":
        raise ImageParseError(f"the image config has a rootfs of type {raw.rootfs.type!r}, not layers")
    given = raw.config or _RawExec()
    config = ImageConfig(
        platform=Platform(raw.os, raw.architecture, raw.variant),
        entrypoint=tuple(given.entrypoint or ()),
        cmd=tuple(given.cmd or ()),
        env=tuple(given.env or ()),
        working_dir=given.working_dir or "",
        user=given.user or "",
        stop_signal=given.stop_signal or "",
        exposed_ports=tuple(given.exposed_ports or ()),
        volumes=tuple(given.volumes or ()),
        labels={key: value or "" for key, value in (given.labels or {}).items()},
        diff_ids=tuple(raw.rootfs.diff_ids or ()),
        created=_parse_time(raw.created),
    )
    lists: Sequence[tuple[str, Sequence[str]]] = (
        ("Entrypoint", config.entrypoint),
        ("Cmd", config.cmd),
        ("Env", config.env),
        ("Volumes", config.volumes),
        ("WorkingDir", (config.working_dir,)),
        ("User", (config.user,)),
        ("StopSignal", (config.stop_signal,)),
    )
    for key, texts in lists:
        if any("\0" in text for text in texts):
            raise ImageParseError(f"the image config has a NUL character in {key}")
    return config


def _parse_time(text: str | None) -> datetime | None:
    """Only shown to people, so an odd date is no reason to refuse an image."""
    try:
        return msgspec.convert(text, datetime | None)
    except msgspec.ValidationError:
        return None
