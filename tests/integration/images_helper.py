"""Images, archives and a registry for tests, made from nothing: no network, no fixtures in git."""

import contextlib
import gzip
import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MTIME = 1234567890
Entry = tuple[tarfile.TarInfo, bytes | None]

# struct vfs_cap_data, revision 2: effective, permitted cap_net_bind_service (linux/capability.h).
CAP_NET_BIND = bytes.fromhex("0100000200040000000000000000000000000000")


def file(name: str, data: bytes = b"x", mode: int = 0o644, *, xattrs: Mapping[str, bytes] = {}, **tar: Any) -> Entry:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = len(data), mode, MTIME
    info.pax_headers = {f"SCHILY.xattr.{key}": value.decode() for key, value in xattrs.items()}
    for key, value in tar.items():
        setattr(info, key, value)
    return info, data


def node(name: str, kind: bytes, linkname: str = "", mode: int = 0o755, **tar: Any) -> Entry:
    """A directory, link, device or fifo: `kind` is one of tarfile's *TYPE."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode, info.mtime = kind, linkname, mode, MTIME
    for key, value in tar.items():
        setattr(info, key, value)
    return info, None


def directory(name: str, mode: int = 0o755) -> Entry:
    return node(name, tarfile.DIRTYPE, mode=mode)


def layer(*entries: Entry) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, data in entries:
            tar.addfile(info, io.BytesIO(data) if data is not None else None)
    return buffer.getvalue()


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@dataclass
class Layout:
    """An OCI image layout that grows by add() and add_index()."""

    path: Path
    entries: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.path / "blobs/sha256").mkdir(parents=True)
        (self.path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')

    def ref(self, tag: str) -> str:
        return f"oci:{self.path}:{tag}"

    def blob(self, data: bytes, media_type: str) -> dict[str, Any]:
        digest = sha256(data)
        self.blob_path(digest).write_bytes(data)
        return {"mediaType": media_type, "digest": digest, "size": len(data)}

    def blob_path(self, digest: str) -> Path:
        return self.path / "blobs/sha256" / digest.removeprefix("sha256:")

    def add(
        self,
        tag: str | None,
        *layers: bytes,
        config: Mapping[str, Any] = {},
        architecture: str = "amd64",
        diff_ids: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Add an image; returns its manifest's descriptor."""
        base = "application/vnd.oci.image"
        document = {
            "architecture": architecture,
            "os": "linux",
            "config": dict(config),
            "rootfs": {"type": "layers", "diff_ids": diff_ids or [sha256(item) for item in layers]},
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": f"{base}.manifest.v1+json",
            "config": self.blob(json.dumps(document).encode(), f"{base}.config.v1+json"),
            "layers": [self.blob(gzip.compress(item, 1, mtime=0), f"{base}.layer.v1.tar+gzip") for item in layers],
        }
        return self._tag(tag, self.blob(json.dumps(manifest).encode(), f"{base}.manifest.v1+json"))

    def add_index(self, tag: str, **by_architecture: dict[str, Any]) -> dict[str, Any]:
        kind = "application/vnd.oci.image.index.v1+json"
        manifests = [
            {**item, "platform": {"os": "linux", "architecture": name}} for name, item in by_architecture.items()
        ]
        document = {"schemaVersion": 2, "mediaType": kind, "manifests": manifests}
        return self._tag(tag, self.blob(json.dumps(document).encode(), kind))

    def _tag(self, tag: str | None, descriptor: dict[str, Any]) -> dict[str, Any]:
        if tag is not None:
            named = {**descriptor, "annotations": {"org.opencontainers.image.ref.name": tag}}
            self.entries = [
                item for item in self.entries if item["annotations"]["org.opencontainers.image.ref.name"] != tag
            ]
            self.entries.append(named)
            (self.path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": self.entries}))
        return descriptor


def skopeo_copy(source: str, destination: str, *flags: str) -> None:
    subprocess.run(["skopeo", "--insecure-policy", "copy", "-q", *flags, source, destination], check=True, timeout=180)


@dataclass(frozen=True)
class Registry:
    address: str
    process: "subprocess.Popen[bytes]"

    def push(self, source: str, name: str, *flags: str) -> None:
        skopeo_copy(source, f"docker://{self.address}/{name}", "--dest-tls-verify=false", *flags)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(180)


@contextlib.contextmanager
def registry(place: Path, *, htpasswd: str | None = None) -> Iterator[Registry]:
    """Debian's docker-registry on a free port of loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config: dict[str, Any] = {
        "version": 0.1,
        "log": {"level": "error"},
        "storage": {"filesystem": {"rootdirectory": str(place / "registry")}},
        "http": {"addr": f"127.0.0.1:{port}"},
    }
    if htpasswd is not None:
        (place / "htpasswd").write_text(htpasswd)
        config["auth"] = {"htpasswd": {"realm": "test", "path": str(place / "htpasswd")}}
    (place / "registry.yml").write_text(json.dumps(config))  # JSON is YAML
    with (place / "registry.log").open("wb") as log:
        process = subprocess.Popen(
            ["docker-registry", "serve", str(place / "registry.yml")], stdout=log, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + 180
        while True:
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None, (place / "registry.log").read_text()
            assert time.monotonic() < deadline, "docker-registry does not listen"
            time.sleep(0.05)
        yield Registry(f"127.0.0.1:{port}", process)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(180)


def children_of(place: Path) -> list[str]:
    """Command lines of living processes that speak of `place`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if str(place) in line:
                    found.append(line)
    return found


def kill_hard(process: "subprocess.Popen[bytes]") -> None:
    process.send_signal(signal.SIGKILL)
    process.wait(180)
