"""What all contestants run: one root file system, OCI bundles over it, and the same as an image.

The root file system is the host's static busybox, with GNU dd beside it: busybox's dd cannot write synchronously.
"""

import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["DD", "Bundles", "make_rootfs", "write_archive"]

DD = "gnudd"
CAPABILITIES = ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_KILL", "CAP_SETGID", "CAP_SETUID"]
SEARCH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def make_rootfs(folder: Path) -> Path:
    """busybox with a link for each applet, GNU dd with its libraries, and the folders that are mounted on."""
    for name in ("bin", "dev", "etc", "proc", "sys", "tmp"):
        (folder / name).mkdir(parents=True)
    busybox = Path(shutil.which("busybox") or "/bin/busybox")
    shutil.copy(busybox, folder / "bin" / "busybox")
    listed = subprocess.run([busybox, "--list"], check=True, capture_output=True, text=True).stdout
    for applet in listed.split():
        if applet != "busybox":
            (folder / "bin" / applet).symlink_to("busybox")
    dd = shutil.which("dd") or "/bin/dd"
    shutil.copy(dd, folder / "bin" / DD)
    needed = subprocess.run(["ldd", dd], check=True, capture_output=True, text=True).stdout
    for library in re.findall(r"(/\S+) \(0x", needed):
        target = folder / library.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, target)
    (folder / "etc" / "passwd").write_text("root:x:0:0:root:/:/bin/sh\n")
    return folder


def spec_of(command: Sequence[str], rootfs: Path) -> dict[str, Any]:
    """config.json: as `runc spec` writes it, with what a container engine would change."""
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            "args": list(command),
            "env": [SEARCH],
            "cwd": "/",
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), CAPABILITIES),
            "noNewPrivileges": True,
        },
        "root": {"path": str(rootfs), "readonly": False},
        "hostname": "bench",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {
                "destination": "/dev",
                "type": "tmpfs",
                "source": "tmpfs",
                "options": ["nosuid", "strictatime", "mode=755", "size=65536k"],
            },
            {
                "destination": "/dev/pts",
                "type": "devpts",
                "source": "devpts",
                "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
            },
            {
                "destination": "/sys",
                "type": "sysfs",
                "source": "sysfs",
                "options": ["nosuid", "noexec", "nodev", "ro"],
            },
        ],
        "linux": {
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount")],
        },
    }


class Bundles:
    """OCI bundles that share one root file system: one for each command, written when first asked for."""

    def __init__(self, folder: Path, rootfs: Path) -> None:
        self._folder, self._rootfs = folder, rootfs

    def bundle(self, command: Sequence[str]) -> Path:
        key = hashlib.sha256("\0".join(command).encode()).hexdigest()[:12]
        folder = self._folder / f"bundle-{key}"
        if not folder.exists():
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(json.dumps(spec_of(command, self._rootfs)))
        return folder


def write_archive(rootfs: Path, archive: Path) -> None:
    """The root file system as a docker-archive of one layer."""
    layer = archive.with_suffix(".layer")
    with tarfile.open(layer, "w") as tar:
        tar.add(rootfs, arcname=".")
    with layer.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Cmd": ["sh"], "Env": [SEARCH]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
        "history": [{"created_by": "make bench"}],
    }
    with tarfile.open(archive, "w") as tar:
        tar.add(layer, arcname="layer.tar")
        for name, content in (
            ("config.json", config),
            ("manifest.json", [{"Config": "config.json", "RepoTags": None, "Layers": ["layer.tar"]}]),
        ):
            raw = json.dumps(content).encode()
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    layer.unlink()
