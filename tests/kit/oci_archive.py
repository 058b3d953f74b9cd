"""Images for containerd, made here: no registry is needed. One OCI archive around the host's static busybox.

An archive is an OCI image layout in a tar file (image-spec, image-layout.md), as `ctr images import` reads it.
"""

import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["BUSYBOX", "PAUSE", "image_archives", "write_layout"]

BUSYBOX = "docker.io/katapod-tests/busybox:1"
PAUSE = "docker.io/katapod-tests/pause:1"
PROGRAM = Path("/bin/busybox")
CACHE = Path(__file__).resolve().parents[2] / "build" / "cache"
RECIPE = "1"  # raised when the files below change
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

DIRECTORIES = {
    **dict.fromkeys(("bin", "data", "dev", "etc", "home", "mnt", "proc", "root", "run", "sbin", "sys", "usr"), 0o755),
    **dict.fromkeys(("usr/bin", "usr/sbin", "usr/local", "usr/local/bin", "usr/local/sbin", "var", "var/log"), 0o755),
    **dict.fromkeys(("tmp", "var/tmp"), 0o1777),
}
FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n"
    "user:x:1000:1000::/home:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n",
    "etc/group": "root:x:0:\nuser:x:1000:\nvideo:x:44:user\nnogroup:x:65534:\n",
}
PAUSE_COMMAND = ["sh", "-c", "trap 'exit 0' TERM INT; while :; do sleep 1000000 & wait $!; done"]
"""The first process of a PID namespace gets no signal that it has no handler for; wait() reaps whatever dies here."""


def image_archives() -> list[Path]:
    """The archives of BUSYBOX and PAUSE, made if there are none for this busybox."""
    program = PROGRAM.read_bytes()
    stamp = hashlib.sha256(program + repr((RECIPE, DIRECTORIES, FILES, PAUSE_COMMAND)).encode()).hexdigest()[:12]
    found = []
    for name, command in ((BUSYBOX, ["sh"]), (PAUSE, PAUSE_COMMAND)):
        archive = CACHE / f"{name.rpartition('/')[2].partition(':')[0]}-{stamp}.oci.tar"
        if not archive.exists():
            CACHE.mkdir(parents=True, exist_ok=True)
            half = archive.with_suffix(f".{os.getpid()}")
            _write_archive(half, name, _layer(program), command)
            half.replace(archive)
        found.append(archive)
    return found


def _layer(program: bytes) -> bytes:
    applets = subprocess.run([PROGRAM, "--list-full"], check=True, capture_output=True, text=True).stdout.split()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as layer:
        for name, mode in sorted(DIRECTORIES.items()):
            _add(layer, name, tarfile.DIRTYPE, mode)
        for name, text in FILES.items():
            _add(layer, name, tarfile.REGTYPE, 0o644, text.encode())
        _add(layer, "bin/busybox", tarfile.REGTYPE, 0o755, program)
        for applet in applets:
            if applet != "bin/busybox" and os.path.dirname(applet) in DIRECTORIES:
                _add(layer, applet, tarfile.SYMTYPE, 0o777, link="/bin/busybox")
    return buffer.getvalue()


def _add(archive: tarfile.TarFile, name: str, kind: bytes, mode: int, data: bytes = b"", link: str = "") -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode, entry.linkname, entry.size = kind, mode, link, len(data)
    archive.addfile(entry, io.BytesIO(data))


def _write_archive(target: Path, name: str, layer: bytes, command: Sequence[str]) -> None:
    blobs: dict[str, bytes] = {}

    def stored(media_type: str, content: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        blobs[digest] = content
        return {
            "mediaType": f"application/vnd.oci.image.{media_type}",
            "digest": f"sha256:{digest}",
            "size": len(content),
        }

    def stored_json(media_type: str, content: Mapping[str, Any]) -> dict[str, Any]:
        return stored(f"{media_type}+json", json.dumps(content).encode())

    layer_entry = stored("layer.v1.tar", layer)
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Env": [f"PATH={SEARCH_PATH}"], "Cmd": list(command)},
        "rootfs": {"type": "layers", "diff_ids": [layer_entry["digest"]]},
    }
    manifest = {"schemaVersion": 2, "config": stored_json("config.v1", config), "layers": [layer_entry]}
    entry = stored_json("manifest.v1", manifest)
    entry["annotations"] = {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name}
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as archive:
        for digest, content in blobs.items():
            _add(archive, f"blobs/sha256/{digest}", tarfile.REGTYPE, 0o644, content)
        _add(archive, "oci-layout", tarfile.REGTYPE, 0o644, b'{"imageLayoutVersion": "1.0.0"}')
        index = {"schemaVersion": 2, "manifests": [entry]}
        _add(archive, "index.json", tarfile.REGTYPE, 0o644, json.dumps(index).encode())


def write_layout(target: Path, layer: Path, config: Mapping[str, Any]) -> None:
    """An image layout as a directory, of one image named latest; its layer is a tar file, as it is: compressing
    hundreds of MiB takes many times what unpacking them does."""
    blobs = target / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def entry(media_type: str, blob: Path) -> dict[str, Any]:
        with blob.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        blob.rename(blobs / digest)
        kind = f"application/vnd.oci.image.{media_type}"
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": (blobs / digest).stat().st_size}

    def entry_json(media_type: str, content: Mapping[str, Any]) -> dict[str, Any]:
        half = target / "half"
        half.write_text(json.dumps(content))
        return entry(f"{media_type}+json", half)

    half = target / "half"
    shutil.copyfile(layer, half)
    layers = [entry("layer.v1.tar", half)]
    rootfs = {"type": "layers", "diff_ids": [each["digest"] for each in layers]}
    whole = {"architecture": "amd64", "os": "linux", "config": config, "rootfs": rootfs}
    manifest = {"schemaVersion": 2, "config": entry_json("config.v1", whole), "layers": layers}
    described = entry_json("manifest.v1", manifest)
    described["annotations"] = {"org.opencontainers.image.ref.name": "latest"}
    (target / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (target / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [described]}))
