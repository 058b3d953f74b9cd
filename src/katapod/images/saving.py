"""An image of the store as an archive of Docker's format: its files in one layer, under its names.

The store keeps unpacked files, not the layers that they came in. Source: the image specification of Docker, v1.2
(manifest.json), and of OCI (config.json).
"""

import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from katapod.host.process import run
from katapod.images.store import ImageStore
from katapod.model.errors import KatapodError
from katapod.model.image import ImageRecord

__all__ = ["save_images", "write_archive"]

TAR_LIMIT_S = 3600.0
BLOCK = 1 << 20


async def save_images(store: ImageStore, images: Sequence[tuple[ImageRecord, tuple[str, ...]]], out: BinaryIO) -> None:
    """Write images, each with the names that it is to have. `out` needs no seeking. Raises KatapodError, OSError."""
    with (
        tempfile.TemporaryDirectory(prefix=".save-", dir=store.root) as scratch,
        tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as archive,
    ):
        manifest = []
        for image, names in images:
            layer = Path(scratch) / f"{image.digest[7:]}.tar"
            await _pack(store.rootfs_path(image.digest), layer)
            digest = _digest(layer)
            config = _one_layer(store.config_bytes(image.digest), digest)
            config_name, layer_name = f"{hashlib.sha256(config).hexdigest()}.json", f"{digest}.tar"
            _add(archive, config_name, config)
            archive.add(layer, layer_name)
            layer.unlink()
            manifest.append({"Config": config_name, "RepoTags": list(names) or None, "Layers": [layer_name]})
        _add(archive, "manifest.json", json.dumps(manifest).encode())


def write_archive(out: BinaryIO, document: dict[str, Any], layer: Path, name: str, comment: str) -> None:
    """Write an image with this config and one layer, a tar, under this name. Raises OSError."""
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        digest = _digest(layer)
        document = {**document, "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]}}
        document["history"] = [{"created_by": "kata-runtime commit", "comment": comment}]
        config = json.dumps(document).encode()
        config_name, layer_name = f"{hashlib.sha256(config).hexdigest()}.json", f"{digest}.tar"
        _add(archive, config_name, config)
        archive.add(layer, layer_name)
        manifest = [{"Config": config_name, "RepoTags": [name], "Layers": [layer_name]}]
        _add(archive, "manifest.json", json.dumps(manifest).encode())


async def _pack(root: Path, layer: Path) -> None:
    """All of its files, in an order that does not depend on the file system."""
    command = ["tar", "--create", "--file", str(layer), "--numeric-owner", "--sort=name", "--xattrs"]
    command += ["--xattrs-include=*", "--sparse", "--directory", str(root), "."]
    await run(command, timeout_s=TAR_LIMIT_S)


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(BLOCK):
            found.update(block)
    return found.hexdigest()


def _one_layer(config: bytes, digest: str) -> bytes:
    """The image's config, of which the layers and their history are replaced."""
    try:
        document = json.loads(config)
    except ValueError as exc:
        raise KatapodError(f"cannot save the image: its config is not JSON: {exc}") from exc
    document["rootfs"] = {"type": "layers", "diff_ids": [f"sha256:{digest}"]}
    document["history"] = [{"created_by": "kata-runtime image save"}]
    return json.dumps(document).encode()


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), 0o644
    archive.addfile(entry, io.BytesIO(data))
