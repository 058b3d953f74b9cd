"""From a source to an unpacked root file system: skopeo copies, umoci unpacks, with progress by bytes.

skopeo checks every blob against its digest, and umoci every layer against the config's diff_id, so that a
config digest names exactly one root file system. umoci applies whiteouts, keeps hard links, xattrs, owners,
modes and times, and resolves every path within the rootfs, regardless of `../` and symbolic links in a layer.
"""

import asyncio
import contextlib
import gzip
import hashlib
import os
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec import Struct

from katapod.host.process import Child, find_program, run, spawn, stop_child
from katapod.images.errors import BrokenImage, RegistryUnreachable
from katapod.images.failures import NO_SPACE, crash_of, explain_failure
from katapod.images.files import Staging
from katapod.images.source import (
    Access,
    Descriptor,
    Survey,
    parse_manifest,
    skopeo_environment,
)
from katapod.model.image import (
    CONFIG_MAX_BYTES,
    ImageConfig,
    ImageParseError,
    SkopeoReference,
    Transport,
    parse_digest,
    parse_image_config,
)
from katapod.tasks import beside, finish

__all__ = ["Fetched", "Progress", "fetch", "open_archive", "scan_disk_bytes", "sync_tree", "unpack"]

Progress = Callable[[str, int, int | None], None]
"""Called with the phase ("copy", "unpack"), the bytes done and the total, None if unknown."""

POLL_S = 0.1
OUTPUT_TAIL = 16 * 1024
LAST_WORDS_S = 1.0  # to read the remaining output of a program that has ended
GUNZIP_CHUNK = 1024 * 1024
TAR, TAR_GZIP = "application/vnd.oci.image.layer.v1.tar", "application/vnd.oci.image.layer.v1.tar+gzip"
GZIP_MAGIC, ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
TAG = "image"


class Fetched(Struct, frozen=True):
    """An image in a staging layout, checked but not unpacked."""

    digest: str
    config_bytes: bytes
    config: ImageConfig
    layers: tuple[Descriptor, ...]


async def fetch(
    what: Survey, staging: Staging, access: Access, *, stall_timeout_s: float, progress: Progress | None
) -> Fetched:
    """Copy an image into `staging.layout`. Raises ImageError.

    Uncompressed layers stay so: compressing what is unpacked next would waste time.
    """
    reference = what.reference
    flags = [*access.flags(reference, prefix="src-"), "--dest-oci-accept-uncompressed-layers"]
    await _skopeo_copy(
        f"import {reference}", flags, str(reference), staging, what.total_bytes, stall_timeout_s, progress
    )
    try:
        layers = await asyncio.to_thread(_correct_media_types, staging.layout)
        if any(_layer_magic(staging.layout, item).startswith(ZSTD_MAGIC) for item in layers):
            await _transcode(staging, stall_timeout_s)
            layers = await asyncio.to_thread(_correct_media_types, staging.layout)
        descriptor = parse_manifest(_read_manifest(staging.layout)).config
        if descriptor is None:
            raise BrokenImage("it has no config")
        config_bytes = _read_blob(staging.layout, descriptor.digest)
        if f"sha256:{hashlib.sha256(config_bytes).hexdigest()}" != descriptor.digest:
            raise BrokenImage("the digest of its config is wrong")
        config = parse_image_config(config_bytes)
    except (BrokenImage, ImageParseError, FileNotFoundError) as exc:
        raise BrokenImage(f"cannot import {reference}: it is damaged or not a container image ({exc})") from exc
    return Fetched(descriptor.digest, config_bytes, config, tuple(layers))


async def open_archive(reference: SkopeoReference, staging: Staging) -> SkopeoReference:
    """A gzip'ed docker-archive is decompressed to `staging`; everything else is returned as it is.

    skopeo 1.9 (Debian 12) loses most of such an archive; it reads xz, zstd and oci-archives correctly.
    """
    if reference.transport is not Transport.DOCKER_ARCHIVE or not _is_gzip(reference.location):
        return reference
    plain, stop = staging.scratch / "archive.tar", threading.Event()
    try:
        await finish(asyncio.to_thread(_gunzip, reference.location, plain, stop), name="gunzip", on_cancel=stop.set)
    except (EOFError, zlib.error, gzip.BadGzipFile) as exc:
        raise BrokenImage(f"cannot import {reference}: it is damaged ({exc})") from exc
    return SkopeoReference(reference.transport, str(plain), reference.selector)


def _is_gzip(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == GZIP_MAGIC


def _gunzip(path: str, plain: Path, stop: threading.Event) -> None:
    with gzip.open(path) as packed, plain.open("wb") as output:
        while not stop.is_set() and (chunk := packed.read(GUNZIP_CHUNK)):
            output.write(chunk)


async def _skopeo_copy(
    doing: str,
    flags: list[str],
    source: str,
    staging: Staging,
    total_bytes: int | None,
    stall_timeout_s: float,
    progress: Progress | None,
) -> None:
    argv = [
        find_program("skopeo", package="skopeo"),
        "--insecure-policy",
        f"--tmpdir={staging.scratch}",
        *("copy", "--quiet", "--format", "oci", *flags),
        source,
        f"oci:{staging.layout}:{TAG}",
    ]

    def arrived_bytes() -> int:
        return measure_tree(staging.layout) + measure_tree(staging.scratch)

    await _run_watched(
        doing,
        argv,
        staging,
        measure=arrived_bytes,
        report=_reporter(progress, "copy", total_bytes),
        stall_timeout_s=stall_timeout_s,
    )


async def _transcode(staging: Staging, stall_timeout_s: float) -> None:
    """Recompress zstd layers as gzip: umoci 0.4 does not read zstd."""
    compressed = staging.path / "zstd"
    os.rename(staging.layout, compressed)
    await _skopeo_copy(
        "decompress the layers",
        ["--dest-compress-format", "gzip"],
        f"oci:{compressed}:{TAG}",
        staging,
        None,
        stall_timeout_s,
        None,
    )


async def unpack(image: Fetched, staging: Staging, *, what: str, progress: Progress | None) -> None:
    """Unpack the layers in `staging.layout` to `staging.rootfs`. Raises ImageError."""
    # The shell only sets the umask: the mode of a directory that no layer lists must not depend on ours.
    argv = [
        *("sh", "-c", 'umask 022 && exec "$@"', "sh"),
        *(find_program("umoci", package="umoci"), "--log=error", "raw", "unpack"),
        *("--image", f"{staging.layout}:{TAG}", str(staging.rootfs)),
    ]
    sizes = [(parse_digest(item.digest), item.size) for item in image.layers]
    total_bytes = sum(size for _, size in sizes)

    def read_bytes(pid: int) -> int:
        return _position_in_layers(pid, sizes)

    await _run_watched(
        f"unpack {what}",
        argv,
        staging,
        measure_pid=read_bytes,
        report=_reporter(progress, "unpack", total_bytes),
    )


async def _run_watched(
    doing: str,
    argv: list[str],
    staging: Staging,
    *,
    report: Callable[[int | None], None],
    measure: Callable[[], int] | None = None,
    measure_pid: Callable[[int], int] | None = None,
    stall_timeout_s: float | None = None,
) -> None:
    """Run a program to its end and report progress; kill it on cancellation, or when there is no more progress."""
    loop = asyncio.get_running_loop()
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    async with beside(_read_tail(read_end), name="read what it says") as said:  # not a file: the disk may be full
        try:
            child = await spawn(argv, output=write_end, env=skopeo_environment(os.environ))
        finally:
            os.close(write_end)
        try:
            async with beside(child.process.wait(), name=f"wait for {argv[0]}") as waiting:
                last_bytes, moved_at = -1, loop.time()
                report(0)
                while not (await asyncio.wait({waiting}, timeout=POLL_S))[0]:
                    now_bytes = measure() if measure else measure_pid(child.pid) if measure_pid else 0
                    if now_bytes != last_bytes:
                        last_bytes, moved_at = now_bytes, loop.time()
                        report(now_bytes)
                    elif stall_timeout_s is not None and loop.time() - moved_at > stall_timeout_s:
                        raise RegistryUnreachable(
                            f"cannot {doing}: no data for {stall_timeout_s:g} s", hint="try again; check the network"
                        )
        finally:
            await finish(_end(child))
            await asyncio.wait({said}, timeout=LAST_WORDS_S)
    if child.process.returncode != 0:
        tail = said.result() if not said.cancelled() else ""
        # After any error umoci 0.4 may crash before it tells of it: two of its threads then read the layer at once.
        if crash_of(tail) and _is_full(staging.path):
            tail = NO_SPACE
        raise explain_failure(doing, tail, child.describe_end())
    report(None)


def _is_full(path: Path) -> bool:
    """Whether a file system has no block or no inode left (statvfs(3))."""
    state = os.statvfs(path)
    return state.f_bavail == 0 or (state.f_files > 0 and state.f_favail == 0)


async def _end(child: Child) -> None:
    await stop_child(child, soft=False)


async def _read_tail(fd: int) -> str:
    """The tail of what comes from a pipe; closes the pipe."""
    reader, tail = asyncio.StreamReader(), b""
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(fd, "rb", 0)
    )
    try:
        while data := await reader.read(OUTPUT_TAIL):
            tail = (tail + data)[-OUTPUT_TAIL:]
    finally:
        transport.close()
    return tail.decode(errors="replace")


def _reporter(progress: Progress | None, phase: str, total_bytes: int | None) -> Callable[[int | None], None]:
    """Report no more than the total and no less than before; None stands for the end."""
    best = 0

    def report(done_bytes: int | None) -> None:
        nonlocal best
        if done_bytes is None:
            best = total_bytes if total_bytes is not None else best
        else:
            best = max(best, done_bytes if total_bytes is None else min(done_bytes, total_bytes))
        if progress is not None:
            progress(phase, best, best if done_bytes is None else total_bytes)

    return report


def measure_tree(path: Path) -> int:
    """Sum of the sizes of the files below `path`; files that vanish meanwhile do not count."""
    total_bytes = 0
    pending = [os.fspath(path)]
    while pending:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                else:
                    with contextlib.suppress(FileNotFoundError):
                        total_bytes += entry.stat(follow_symlinks=False).st_size
    return total_bytes


def scan_disk_bytes(path: Path) -> int:
    """Disk space of a tree: hard links count once, and no link is followed out of it."""
    total_bytes = 0
    seen: set[int] = set()
    pending = [os.fspath(path)]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                info = entry.stat(follow_symlinks=False)
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                elif info.st_nlink > 1:
                    if info.st_ino in seen:
                        continue
                    seen.add(info.st_ino)
                total_bytes += info.st_blocks * 512
    return total_bytes


async def sync_tree(path: Path) -> None:
    """Sync the file system of `path`: after a power failure an image is complete or absent (syncfs(2))."""
    await run(["sync", "-f", str(path)], timeout_s=None)


def _position_in_layers(pid: int, layers: list[tuple[str, int]]) -> int:
    """How far a process has read the layer files, which it opens one after another (proc(5), fdinfo)."""
    with contextlib.suppress(OSError, ValueError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            name = os.path.basename(os.readlink(f"/proc/{pid}/fd/{fd}"))
            before_bytes = 0
            for layer_hex, size_bytes in layers:
                if layer_hex == name:
                    first = Path(f"/proc/{pid}/fdinfo/{fd}").read_text().split("\n", 1)[0]
                    return before_bytes + int(first.removeprefix("pos:"))
                before_bytes += size_bytes
    return 0


def _read_manifest(layout: Path) -> bytes:
    entries = parse_manifest((layout / "index.json").read_bytes()).manifests or []
    if len(entries) != 1:
        raise BrokenImage(f"the copy holds {len(entries)} images")
    return _read_blob(layout, entries[0].digest)


def _read_blob(layout: Path, digest: str) -> bytes:
    with (layout / "blobs" / "sha256" / parse_digest(digest)).open("rb") as file:
        return file.read(CONFIG_MAX_BYTES + 1)


def _layer_magic(layout: Path, layer: Descriptor) -> bytes:
    with (layout / "blobs" / "sha256" / parse_digest(layer.digest)).open("rb") as file:
        return file.read(4)


def _correct_media_types(layout: Path) -> list[Descriptor]:
    """Correct the manifest's compression types of the layers, and return the layers.

    skopeo 1.9 calls a plain layer of a docker-archive `tar+gzip`; umoci believes it and fails.
    """
    data = _read_manifest(layout)
    layers = parse_manifest(data).layers
    document = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    described = msgspec.json.decode(document.get("layers", msgspec.Raw(b"[]")), type=list[dict[str, object]])
    changed = False
    for layer, description in zip(layers, described, strict=True):
        magic = _layer_magic(layout, layer)
        true_type = TAR_GZIP if magic.startswith(GZIP_MAGIC) else TAR
        if layer.media_type in (TAR, TAR_GZIP) and layer.media_type != true_type and magic != ZSTD_MAGIC:
            description["mediaType"] = true_type
            changed = True
    if changed:
        document["layers"] = msgspec.Raw(msgspec.json.encode(described))
        _write_manifest(layout, msgspec.json.encode(document))
    return layers


def _write_manifest(layout: Path, manifest: bytes) -> None:
    manifest_hex = hashlib.sha256(manifest).hexdigest()
    (layout / "blobs" / "sha256" / manifest_hex).write_bytes(manifest)
    descriptor = {
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "digest": f"sha256:{manifest_hex}",
        "size": len(manifest),
        "annotations": {"org.opencontainers.image.ref.name": TAG},
    }
    (layout / "index.json").write_bytes(msgspec.json.encode({"schemaVersion": 2, "manifests": [descriptor]}))
