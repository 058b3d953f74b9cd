"""The built-in image: a root file system around the host's static busybox.

So the first container needs no registry. The image's identity is a hash over the binary and the version of the recipe
below: when either changes, it is made again.
"""

import hashlib
import os
import struct
from pathlib import Path

import msgspec

from katapod.host.process import ProcessFailed, run
from katapod.images.errors import ImageError

__all__ = [
    "BUSYBOX_NAME",
    "BUSYBOX_SOURCE",
    "busybox_config",
    "busybox_stamp",
    "check_static",
    "list_applets",
    "make_rootfs",
]

BUSYBOX_NAME = "busybox:latest"
BUSYBOX_SOURCE = "host:busybox"
RECIPE = "1"  # incremented when the output of make_rootfs() changes
INSTALL_HINT = "install the package busybox-static: apt-get install busybox-static"

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
DIRECTORIES = {
    **dict.fromkeys(("bin", "dev", "etc", "home", "mnt", "opt", "proc", "run", "sbin", "srv", "sys"), 0o755),
    **dict.fromkeys(("usr", "usr/bin", "usr/sbin", "usr/local", "usr/local/bin", "var", "var/log"), 0o755),
    **dict.fromkeys(("tmp", "var/tmp"), 0o1777),
    "root": 0o700,
}
FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n",
    "etc/group": "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    "etc/profile": f"export PATH={PATH}\n",
}
PT_INTERP, ELF_HEAD_MAX = 3, 64 * 1024


def busybox_stamp(binary: Path) -> str:
    """A stamp of the binary, by one stat(2): it changes when the binary does. Raises ImageError if there is none."""
    try:
        info = binary.stat()
    except OSError as exc:
        raise ImageError(f"cannot make the busybox image: {binary}: {exc.strerror}", hint=INSTALL_HINT) from exc
    return f"{RECIPE}:{info.st_dev}:{info.st_ino}:{info.st_size}:{info.st_mtime_ns}:{info.st_ctime_ns}"


def busybox_config(data: bytes, *, architecture: str) -> bytes:
    """The OCI config for a rootfs around the binary `data`. There are no layers: a label is its identity."""
    return msgspec.json.encode(
        {
            "architecture": architecture,
            "os": "linux",
            "config": {
                "Env": [f"PATH={PATH}"],
                "Cmd": ["sh"],
                "Labels": {
                    "katapod.busybox.recipe": RECIPE,
                    "katapod.busybox.sha256": hashlib.sha256(data).hexdigest(),
                },
            },
            "rootfs": {"type": "layers", "diff_ids": []},
        }
    )


def check_static(data: bytes, binary: Path) -> None:
    """Raises ImageError unless `data` is an ELF program that asks for no dynamic linker (elf(5): PT_INTERP)."""
    try:
        if data[:4] != b"\x7fELF":
            raise ImageError(f"cannot make the busybox image: {binary} is not an ELF program", hint=INSTALL_HINT)
        wide, order = data[4] == 2, "<" if data[5] == 1 else ">"
        (start,) = struct.unpack_from(order + ("Q" if wide else "I"), data, 32 if wide else 28)
        size, count = struct.unpack_from(order + "HH", data, 54 if wide else 42)
        kinds = [struct.unpack_from(order + "I", data, start + index * size)[0] for index in range(count)]
    except (struct.error, IndexError) as exc:
        raise ImageError(f"cannot make the busybox image: {binary} is truncated", hint=INSTALL_HINT) from exc
    if PT_INTERP in kinds:
        raise ImageError(
            f"cannot make the busybox image: {binary} is dynamically linked",
            hint=INSTALL_HINT,
        )


async def list_applets(binary: Path) -> list[str]:
    """The paths of the applets: bin/sh, usr/bin/awk, ..."""
    try:
        output = (await run([str(binary), "--list-full"], timeout_s=10)).stdout
    except ProcessFailed as exc:
        raise ImageError(f"cannot make the busybox image: {exc}", hint=INSTALL_HINT) from exc
    return [line for line in output.splitlines() if line.partition("/")[0] in ("bin", "sbin", "usr")]


def make_rootfs(rootfs: Path, data: bytes, applets: list[str]) -> None:
    """Fill `rootfs`, which must not exist. Modes do not depend on the umask."""
    rootfs.mkdir()
    rootfs.chmod(0o755)
    for name, mode in DIRECTORIES.items():
        (rootfs / name).mkdir()
        (rootfs / name).chmod(mode)
    for name, text in FILES.items():
        (rootfs / name).write_text(text)
        (rootfs / name).chmod(0o644)
    program = rootfs / "bin/busybox"
    with program.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    program.chmod(0o755)
    for applet in applets:
        if applet != "bin/busybox" and os.path.normpath(applet) == applet:
            place = rootfs / applet
            if place.parent.is_dir() and not os.path.lexists(place):
                place.symlink_to("/bin/busybox")
