"""What is put on a node: one directory, /opt/katapod/TARGET, with all that Katapod needs in it.

    rootfs/usr, rootfs/boot   Debian's programs, libraries, kernels and modules, and Katapod: copied from the image
    bin/PROGRAM               starts PROGRAM of rootfs/usr/bin
    bin/busybox               static: what the starters are run by
    proof/                    a root directory with nothing but busybox, for the sandbox of the proof

A starter makes a mount namespace in which /usr, and what links to it, is the payload's, and everything else is the
node's: its /run, /var, /etc, /dev. So nothing but a kernel is assumed of the node, no package of it is used, and no
path that Katapod knows changes. Mounts that the node makes later are seen inside, and none of ours outside.
Several payloads stand side by side: a sandbox goes on with the one that it was started from.
"""

import contextlib
import os
import shutil
import stat
from pathlib import Path

from katapod.operator.node.errors import NodeError
from katapod.operator.node.host import Host

__all__ = [
    "HANDLERS",
    "HOME",
    "IMAGES",
    "SHIM",
    "copy_images",
    "install_payload",
    "payload_path",
    "payloads",
    "remove_payload",
    "users_of",
]

HOME = "/opt/katapod"
HANDLERS = "handlers"  # in HOME, beside payloads: handler_files.py
IMAGES = "/var/cache/kata-containers"
SHIM = "containerd-shim-kata-v2"
PROGRAMS = ("kata-runtime", SHIM, "kata-monitor", "kata-node")
PARTS = ("usr", "boot")
LINKED = ("bin", "sbin", "lib", "lib64")
ROOM = 1.1  # of what is copied has to be free

STARTER = """#!{home}/bin/busybox sh
# {program} with the payload's /usr in place of the node's, in a mount namespace of its own.
exec {home}/bin/busybox unshare --mount --propagation slave {home}/bin/busybox sh {home}/bin/enter {program} "$@"
"""

ENTER = """# Run by the starters, in a mount namespace of their own: PROGRAM ARGUMENT...
box={home}/bin/busybox
for part in {parts}; do
    [ ! -d "/$part" ] || $box mount -o bind "{home}/rootfs/$part" "/$part" || exit 70
done
for part in {linked}; do # links to usr/ on most systems
    [ -L "/$part" ] || $box mount -o bind "{home}/rootfs/usr/$part" "/$part" || exit 70
done
[ ! -e /etc/ld.so.cache ] || $box mount -o bind /dev/null /etc/ld.so.cache || exit 70
[ ! -d /etc/alternatives ] || $box mount -o bind "{home}/rootfs/alternatives" /etc/alternatives || exit 70
program=$1
shift
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export PATH
exec "/usr/bin/$program" "$@"
"""


def payload_path(target: str) -> str:
    """Of a payload on the node."""
    return f"{HOME}/{target}"


def payloads(host: Host) -> list[str]:
    """Targets of all that are there."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(one.name for one in host.path(HOME).iterdir() if one.is_dir() and one.name != HANDLERS)
    return []


def install_payload(host: Host, source: Path, target: str) -> bool:
    """Copy it from the root directory `source`, unless it is there; False if it was. Half a one is never taken for one.

    Raises NodeError: no room, no payload in `source`.
    """
    home = payload_path(target)
    final = host.path(home)
    if final.exists():
        return False
    if not (source / "usr/bin/kata-runtime").exists() or not (source / "bin/busybox").exists():
        raise NodeError(f"{source} holds no payload: it lacks usr/bin/kata-runtime, or bin/busybox")
    half = host.path(f"{HOME}/.{target}.new")
    shutil.rmtree(half, ignore_errors=True)
    half.parent.mkdir(parents=True, exist_ok=True)
    _check_room(source, half.parent)
    try:
        for part in PARTS:
            shutil.copytree(source / part, half / "rootfs" / part, symlinks=True)
        shutil.copytree(source / "etc/alternatives", half / "rootfs/alternatives", symlinks=True)
        _write_starters(half, home, source)
        _write_proof(half, source)
        half.rename(final)
    except (OSError, shutil.Error) as exc:
        shutil.rmtree(half, ignore_errors=True)
        raise NodeError(f"cannot write {home}: {exc}") from exc
    return True


def copy_images(host: Host, source: Path) -> None:
    """Guest images that were built with the payload, if the node has none of its own. Raises NodeError."""
    built, target = source / IMAGES.lstrip("/"), host.path(IMAGES)
    if not (built / "osbuilder-images").is_dir() or (target / "osbuilder-images").exists():
        return
    half = target / ".images.new"
    shutil.rmtree(half, ignore_errors=True)
    try:
        shutil.copytree(built / "osbuilder-images", half, symlinks=True)
        for link in built.iterdir():
            if link.is_symlink() and not (target / link.name).is_symlink():
                (target / link.name).symlink_to(os.readlink(link))
        half.rename(target / "osbuilder-images")
    except (OSError, shutil.Error) as exc:
        shutil.rmtree(half, ignore_errors=True)
        raise NodeError(f"cannot write {IMAGES}: {exc}") from exc


def remove_payload(host: Host, target: str) -> None:
    """Also half a one. Raises NodeError."""
    gone = host.path(f"{HOME}/.{target}.old")
    with contextlib.suppress(FileNotFoundError):  # away at once, so that what is left is never taken for one
        host.path(payload_path(target)).rename(gone)
    for rest in (f"{HOME}/.{target}.old", f"{HOME}/.{target}.new"):
        host.remove(rest)


def users_of(target: str) -> list[int]:
    """Processes that were started from a payload: it is in their mount tables. Source: proc(5), mountinfo."""
    found = []
    mark = f"{payload_path(target)}/rootfs/".encode()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                if mark in Path(f"/proc/{entry}/mountinfo").read_bytes():
                    found.append(int(entry))
    return found


def _write_starters(half: Path, home: str, source: Path) -> None:
    folder = half / "bin"
    folder.mkdir()
    shutil.copy2(source / "bin/busybox", folder / "busybox")
    (folder / "enter").write_text(ENTER.format(home=home, parts=" ".join(PARTS), linked=" ".join(LINKED)))
    for program in PROGRAMS:
        starter = folder / program
        starter.write_text(STARTER.format(home=home, program=program))
        starter.chmod(0o755)


def _write_proof(half: Path, source: Path) -> None:
    for folder in ("bin", "dev", "etc", "proc", "sys", "tmp"):
        (half / "proof" / folder).mkdir(parents=True)
    shutil.copy2(source / "bin/busybox", half / "proof/bin/busybox")


def _check_room(source: Path, folder: Path) -> None:
    size = 0
    for part in PARTS:
        for top, _, files in os.walk(source / part):
            for name in files:
                found = os.lstat(f"{top}/{name}")
                size += found.st_blocks * 512 if stat.S_ISREG(found.st_mode) else 0
    free = shutil.disk_usage(folder).free
    if free < size * ROOM:
        raise NodeError(f"{HOME} needs {size // 2**20} MiB, and its disk has {free // 2**20} MiB free")
