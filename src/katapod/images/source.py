"""An image at its source, before it is copied: identity, manifest, sizes, platform.

Reads manifests of the `oci:` and `dir:` transports from disk and those of registries through skopeo.
"""

import asyncio
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from katapod.host.process import ProcessFailed, find_program, run
from katapod.images.errors import BrokenImage, ImageError, ImageNotFound, RegistryUnreachable, WrongPlatform
from katapod.images.failures import explain_failure
from katapod.model.image import (
    CONFIG_MAX_BYTES,
    ImageParseError,
    Platform,
    SkopeoReference,
    Transport,
    parse_digest,
    parse_image_name,
)

__all__ = [
    "DEFAULT_ACCESS",
    "Access",
    "Descriptor",
    "Manifest",
    "Survey",
    "absolute",
    "archive_tags",
    "explain_archive_platform",
    "parse_manifest",
    "read_stamp",
    "skopeo_environment",
    "survey",
    "wrong_platform",
]

ARCHIVE_TIMEOUT_S = 600.0  # to read the index skopeo reads the whole archive
ARCHIVES = (Transport.OCI_ARCHIVE, Transport.DOCKER_ARCHIVE)
# Variables for skopeo beyond the usual environment: proxies, certificates, credentials.
PASSED_ON = (
    *(f"{name}_PROXY" for name in ("HTTP", "HTTPS", "NO", "ALL")),
    *(f"{name}_proxy" for name in ("http", "https", "no", "all")),
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "REGISTRY_AUTH_FILE",
    "DOCKER_CONFIG",
    "CONTAINERS_REGISTRIES_CONF",
)


class Access(Struct, frozen=True):
    """How to access registries."""

    tls_verify: bool | None = None
    """None: verify, except on loopback, where test registries use plain HTTP (as in Docker)."""
    authfile: Path | None = None
    """Credentials in the format of containers-auth.json(5); None: where `skopeo login` puts them."""
    registries: tuple[str, ...] | None = None
    """Where a name is looked for that is not stored and has no registry; None: nothing is looked for by its name."""

    def flags(self, reference: SkopeoReference, *, prefix: str = "") -> list[str]:
        """skopeo's switches; `prefix` is "src-" for `copy`."""
        if reference.transport is not Transport.DOCKER:
            return []
        verify = self.tls_verify if self.tls_verify is not None else not _is_loopback(reference.registry)
        flags = [f"--{prefix}tls-verify={str(verify).lower()}"]
        if self.authfile is not None:
            flags.append(f"--{prefix}authfile={self.authfile}")
        return flags


DEFAULT_ACCESS = Access()


def _is_loopback(registry: str) -> bool:
    host = registry.rpartition(":")[0] or registry
    return host in ("localhost", "[::1]") or host.startswith("127.")


class _PlatformField(msgspec.Struct, frozen=True):
    architecture: str = ""
    os: str = ""
    variant: str = ""


class Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    """OCI content descriptor (descriptor.md); unknown keys are ignored, as the spec says."""

    digest: str
    size: int = 0
    media_type: str = ""
    platform: _PlatformField | None = None
    annotations: dict[str, str] | None = None


class Manifest(msgspec.Struct, frozen=True, rename="camel"):
    """An OCI or Docker manifest, or an index of them: one of `config` and `manifests` is there."""

    config: Descriptor | None = None
    layers: list[Descriptor] = []
    manifests: list[Descriptor] | None = None


class Survey(Struct, frozen=True):
    """What is known about a source before the copy."""

    reference: SkopeoReference
    """For a registry: pinned to the digest of one platform's manifest, in case the tag moves."""
    source_digest: str = ""
    total_bytes: int | None = None
    """Bytes that the copy will write, layers and temporary files together."""


def parse_manifest(data: bytes) -> Manifest:
    """Parse an untrusted manifest or index. Raises BrokenImage."""
    try:
        if len(data) > CONFIG_MAX_BYTES:
            raise BrokenImage(f"cannot read the image manifest: it is too large ({len(data)} bytes)")
        manifest = msgspec.json.decode(data, type=Manifest)
        for item in (*manifest.layers, *(manifest.manifests or ()), *filter(None, [manifest.config])):
            parse_digest(item.digest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ImageParseError) as exc:
        raise BrokenImage(f"cannot read the image manifest: {exc}") from exc
    return manifest


def absolute(reference: SkopeoReference, *, cwd: Path) -> SkopeoReference:
    """The reference with an absolute path, as it is recorded. Raises ImageNotFound if there is no such file."""
    if reference.transport is Transport.DOCKER:
        return reference
    path = os.path.normpath(cwd / reference.location)
    if ":" in path:
        raise ImageError(f"cannot import {path}: skopeo does not accept a path with a colon", hint="rename the file")
    if not os.path.exists(path):
        raise ImageNotFound(f"cannot import {reference}: there is no {path}")
    if reference.transport in ARCHIVES and not os.path.isfile(path):
        raise BrokenImage(
            f"cannot import {reference}: {path} is not a regular file", hint="for a directory use oci:PATH"
        )
    return SkopeoReference(reference.transport, path, reference.selector)


def read_stamp(reference: SkopeoReference) -> str:
    """Identity of a local source: unchanged if the image is. Empty for a registry.

    `oci:` is content-addressed, so the tag's digest suffices; archives are identified by inode, size and times.
    """
    path = Path(reference.location)
    try:
        match reference.transport:
            case Transport.DOCKER:
                return ""
            case Transport.OCI:
                return _find_in_layout(reference).digest
            case Transport.DIR:
                return _digest_of((path / "manifest.json").read_bytes())
            case Transport.OCI_ARCHIVE | Transport.DOCKER_ARCHIVE:
                info = path.stat()
                return f"{info.st_dev}:{info.st_ino}:{info.st_size}:{info.st_mtime_ns}:{info.st_ctime_ns}"
    except OSError as exc:
        raise BrokenImage(f"cannot read {reference}: {exc.strerror}: {exc.filename}") from exc


def _find_in_layout(reference: SkopeoReference) -> Descriptor:
    entries = parse_manifest((Path(reference.location) / "index.json").read_bytes()).manifests or []
    tags = [(item.annotations or {}).get("org.opencontainers.image.ref.name", "") for item in entries]
    known = ", ".join(sorted(tag for tag in tags if tag)[:20]) or "none"
    if not reference.selector:
        if len(entries) == 1:
            return entries[0]
        raise ImageNotFound(
            f"cannot import {reference}: it holds {len(entries)} images and no tag was given",
            hint=f"add a tag; there are: {known}",
        )
    if reference.selector not in tags:
        raise ImageNotFound(
            f"cannot import {reference}: there is no tag {reference.selector!r}", hint=f"there are: {known}"
        )
    return entries[tags.index(reference.selector)]


async def survey(reference: SkopeoReference, access: Access, platform: Platform, *, timeout_s: float) -> Survey:
    """Inspect the source. Raises WrongPlatform if an index has nothing for `platform`."""
    if reference.transport in ARCHIVES:
        size_bytes = os.stat(reference.location).st_size
        with open(reference.location, "rb") as file:
            file.seek(257)
            plain = file.read(5) == b"ustar"
        if not plain:
            return Survey(reference)  # compressed: the size is of no use
        # skopeo unpacks an oci-archive to its temporary directory before it copies.
        return Survey(reference, total_bytes=size_bytes * (2 if reference.transport is Transport.OCI_ARCHIVE else 1))
    data = await _read_manifest(reference, access, timeout_s)
    source_digest = _digest_of(data)
    manifest = parse_manifest(data)
    for _ in range(2):  # an index may hold an index
        if manifest.manifests is None or reference.transport is Transport.DIR:
            break
        chosen = _choose(reference, manifest.manifests, platform)
        if reference.transport is Transport.DOCKER:
            reference = reference.pinned(chosen.digest)
            data = await _read_manifest(reference, access, timeout_s)
        else:
            data = _read_blob(reference, chosen)
        manifest = parse_manifest(data)
    else:
        return Survey(reference, source_digest)
    if reference.transport is Transport.DOCKER:
        reference = reference.pinned(_digest_of(data))
    return Survey(reference, source_digest, sum(item.size for item in manifest.layers) or None)


def _choose(reference: SkopeoReference, entries: Sequence[Descriptor], platform: Platform) -> Descriptor:
    for item in entries:
        given = item.platform or _PlatformField()
        if platform.runs(Platform(given.os, given.architecture)):
            return item
    raise wrong_platform(str(reference), [item.platform or _PlatformField() for item in entries], platform)


def wrong_platform(source: str, found: Sequence[_PlatformField | Platform], platform: Platform) -> WrongPlatform:
    """The error for an image, or an index, that is for other machines only."""
    names = sorted({str(Platform(item.os, item.architecture, item.variant)) for item in found} - {"unknown/unknown"})
    return WrongPlatform(
        f"cannot use image {source}: it is built for {', '.join(names) or 'nothing'}, this machine is {platform}",
        hint=f"use an image that is built for {platform}",
    )


async def explain_archive_platform(
    reference: SkopeoReference, source: str, platform: Platform, *, scratch: Path
) -> WrongPlatform:
    """The same error for an archive, whose index only skopeo has read."""
    argv = [f"--tmpdir={scratch}", "inspect", "--raw", str(reference)]
    output = await _skopeo(f"read image {reference}", argv, ARCHIVE_TIMEOUT_S)
    entries = parse_manifest(output.encode()).manifests or []
    return wrong_platform(source, [item.platform or _PlatformField() for item in entries], platform)


async def _read_manifest(reference: SkopeoReference, access: Access, timeout_s: float) -> bytes:
    if reference.transport is Transport.OCI:
        return _read_blob(reference, _find_in_layout(reference))
    if reference.transport is Transport.DIR:
        return (Path(reference.location) / "manifest.json").read_bytes()
    argv = ["inspect", "--raw", *access.flags(reference), str(reference)]
    return (await _skopeo(f"pull {reference}", argv, timeout_s)).encode()


def _read_blob(reference: SkopeoReference, descriptor: Descriptor) -> bytes:
    path = Path(reference.location) / "blobs" / "sha256" / parse_digest(descriptor.digest)
    try:
        with path.open("rb") as file:
            return file.read(CONFIG_MAX_BYTES + 1)
    except OSError as exc:
        raise BrokenImage(f"cannot import {reference}: it lacks the blob {descriptor.digest}") from exc


async def archive_tags(reference: SkopeoReference, *, scratch: Path) -> list[str]:
    """The names that `docker save` wrote into a docker-archive."""
    argv = [f"--tmpdir={scratch}", "list-tags", f"docker-archive:{reference.location}"]
    output = await _skopeo(f"read {reference}", argv, ARCHIVE_TIMEOUT_S)
    tags = msgspec.json.decode(output, type=_TagList).tags or []
    return [tag for tag in tags if _is_name(tag)]


class _TagList(msgspec.Struct, rename="pascal"):
    tags: list[str] | None = None


def _is_name(text: str) -> bool:
    try:
        parse_image_name(text)
    except ImageParseError:
        return False
    return True


async def _skopeo(doing: str, arguments: Sequence[str], timeout_s: float) -> str:
    """Run a quick skopeo command; its failure becomes the ImageError for `cannot <doing>`."""
    argv = [find_program("skopeo", package="skopeo"), "--insecure-policy", *arguments]
    try:
        async with asyncio.timeout(timeout_s):
            done = await run(argv, timeout_s=None, env=skopeo_environment(os.environ))
    except TimeoutError as exc:
        raise RegistryUnreachable(
            f"cannot {doing}: no answer within {timeout_s:g} s", hint="try again; check the network"
        ) from exc
    except ProcessFailed as exc:
        raise explain_failure(doing, exc.stderr, exc.status) from exc
    return done.stdout


def skopeo_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of our environment that skopeo gets, beyond what every program gets."""
    return {key: environ[key] for key in PASSED_ON if key in environ}


def _digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
