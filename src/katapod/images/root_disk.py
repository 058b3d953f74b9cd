"""An image of the store as a read-only disk, beside its unpacked files.

Made with e2fsprogs when a container asks for it first. No file system is mounted here: what lies in an image
is not for the host's kernel to interpret.
"""

import asyncio
import os
import stat
from pathlib import Path

from katapod.host.process import ProcessFailed, find_program, run
from katapod.host.tasks import finish
from katapod.plan.root_disk import RootDirectory, plan_disk_bytes, render_debugfs, render_mke2fs

__all__ = ["make_root_disk"]

PACKAGE = "e2fsprogs"


async def make_root_disk(rootfs: Path, target: Path, *, content_bytes: int, scratch: Path) -> None:
    """Make `target`, a disk with the files of `rootfs`, and bring it to the host's disk.

    `scratch` is a directory for what is needed meanwhile. Raises MissingProgram, ProcessFailed, OSError.
    """
    mke2fs = find_program("mke2fs", package=PACKAGE)
    debugfs = find_program("debugfs", package=PACKAGE)
    with open(target, "xb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.truncate(plan_disk_bytes(content_bytes))
    _, *arguments = render_mke2fs(rootfs, target)
    await run([mke2fs, *arguments], timeout_s=None)
    commands = scratch / "debugfs"
    commands.write_text(render_debugfs(_read_root_directory(rootfs)))
    argv = [debugfs, "-w", "-f", str(commands), str(target)]
    done = await run(argv, timeout_s=None)
    # its exit status says nothing of the commands; on standard error stands one line with its version
    if complaints := done.stderr.splitlines()[1:]:
        raise ProcessFailed(argv, "a command failed", "\n".join(complaints))
    await finish(asyncio.to_thread(_sync, target))


def _read_root_directory(rootfs: Path) -> RootDirectory:
    found = os.stat(rootfs)
    return RootDirectory(
        mode=stat.S_IFDIR | stat.S_IMODE(found.st_mode),
        uid=found.st_uid,
        gid=found.st_gid,
        mtime_s=max(0, int(found.st_mtime)),
        has_lost_found=(rootfs / "lost+found").is_dir(),
    )


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
