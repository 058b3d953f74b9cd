#!/usr/bin/env python3
"""Write a root directory as an OCI image: tools/write_image.py ROOTFS NAME TARGET COMMAND...

TARGET is an OCI image layout (image-spec, image-layout.md) in a tar file, with one layer, that is not compressed: that
would take minutes.
"""

import hashlib
import io
import json
import os
import sys
import tarfile
from typing import Any

TYPE = "application/vnd.oci.image"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def main() -> None:
    rootfs, name, target, *command = sys.argv[1:]
    layer = target + ".layer"
    with tarfile.open(layer, "w", format=tarfile.PAX_FORMAT) as archive:
        archive.add(rootfs, ".")
    with open(layer, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Env": [f"PATH={PATH}"], "Cmd": command},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
    }
    texts: dict[str, bytes] = {}
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{TYPE}.manifest.v1+json",
        "config": stored(texts, "config.v1+json", config),
        "layers": [described("layer.v1.tar", digest, os.path.getsize(layer))],
    }
    entry = stored(texts, "manifest.v1+json", manifest)
    entry["annotations"] = {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name}
    texts["oci-layout"] = b'{"imageLayoutVersion": "1.0.0"}'
    texts["index.json"] = json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode()
    with tarfile.open(target + ".new", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.add(layer, f"blobs/sha256/{digest}", filter=as_root)
        for path, data in texts.items():
            one = tarfile.TarInfo(path)
            one.size = len(data)
            archive.addfile(one, io.BytesIO(data))
    os.unlink(layer)
    os.rename(target + ".new", target)


def described(kind: str, digest: str, size: int) -> dict[str, Any]:
    return {"mediaType": f"{TYPE}.{kind}", "digest": f"sha256:{digest}", "size": size}


def stored(texts: dict[str, bytes], kind: str, value: Any) -> dict[str, Any]:
    """Keep a value as a blob; returns its descriptor."""
    data = json.dumps(value).encode()
    digest = hashlib.sha256(data).hexdigest()
    texts[f"blobs/sha256/{digest}"] = data
    return described(kind, digest, len(data))


def as_root(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    return entry


if __name__ == "__main__":
    main()
