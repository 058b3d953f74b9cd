"""An image of the store made from a container's files, or from a tar of a root file system: one layer, as `image save`
writes them."""

import asyncio
import json
import lzma
import tarfile
import zlib
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from katapod.images.errors import BrokenImage
from katapod.images.saving import write_archive
from katapod.images.store import ImageStore
from katapod.model.errors import KatapodError
from katapod.model.image import ImageRecord

__all__ = ["base_config", "commit_image", "import_root"]


def base_config(store: ImageStore, digest: str) -> dict[str, Any]:
    """The config of the image that the container was made of; a plain one if it was made of none. Raises KatapodError,
    OSError."""
    if not digest:
        platform = store.platform
        return {"architecture": platform.architecture, "os": platform.os, "config": {}}
    try:
        document = json.loads(store.config_bytes(digest))
    except ValueError as exc:
        raise KatapodError(f"cannot read the config of image {digest}: it is not JSON: {exc}") from exc
    assert isinstance(document, dict)  # the store has parsed it as a config
    return document


async def commit_image(
    store: ImageStore, document: dict[str, Any], name: str, export: Callable[[BinaryIO], Awaitable[None]], comment: str
) -> ImageRecord:
    """Have what `export` writes, a tar, as an image with this config, under this name. Raises ImageError, KatapodError,
    OSError."""
    store.root.mkdir(mode=0o700, parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".commit-", dir=store.root) as scratch:
        layer, archive = Path(scratch) / "layer.tar", Path(scratch) / "archive.tar"
        with layer.open("wb") as out:
            await export(out)
        document["created"] = datetime.now(UTC).isoformat()
        with archive.open("wb") as out:
            write_archive(out, document, layer, name, comment)
        layer.unlink()
        return await store.import_image(f"docker-archive:{archive}:{name}", name)


async def import_root(
    store: ImageStore, source: BinaryIO, document: dict[str, Any], name: str, comment: str
) -> ImageRecord:
    """Have a tar of a root file system, which gzip, bzip2 or xz may have compressed, as an image with this config,
    under this name. Raises BrokenImage if it is no tar, and as commit_image."""
    return await commit_image(
        store, document, name, lambda out: asyncio.to_thread(_copy_uncompressed, source, out), comment
    )


def _copy_uncompressed(source: BinaryIO, out: BinaryIO) -> None:
    try:
        with (
            tarfile.open(fileobj=source, mode="r|*") as archive,
            tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as copy,
        ):
            for member in archive:
                copy.addfile(member, archive.extractfile(member) if member.isreg() else None)
    except (tarfile.TarError, EOFError, lzma.LZMAError, zlib.error) as exc:
        raise BrokenImage(f"cannot import the root file system: {exc}", hint="it has to be a tar") from exc
