"""An image of the store as a read-only disk, beside its unpacked files.

Made with e2fsprogs when a container asks for it first. No file system is mounted here: what lies in an image
is not for the host's kernel to interpret.
"""

import asyncio
import os
import secrets
import stat
from pathlib import Path

from katapod.host.process import ProcessFailed, find_program, run
from katapod.host.tasks import finish
from katapod.plan.root_disk import RootDirectory, plan_disk_bytes, render_debugfs, render_mke2fs, render_times

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
    root = _read_root_directory(rootfs)
    source = await _with_stand_in(rootfs, root.stand_in, scratch) if root.stand_in else rootfs
    _, *arguments = render_mke2fs(source, target)
    await run([mke2fs, *arguments], timeout_s=None)
    commands = scratch / "debugfs"
    times = await finish(asyncio.to_thread(_read_times, rootfs), name="read-times")
    commands.write_bytes(os.fsencode(render_debugfs(root) + render_times(times)))  # names are in place by then
    argv = [debugfs, "-w", "-f", str(commands), str(target)]
    done = await run(argv, timeout_s=None)
    # its exit status says nothing of the commands; on standard error stands one line with its version
    if complaints := done.stderr.splitlines()[1:]:
        raise ProcessFailed(argv, "a command failed", "\n".join(complaints))
    await finish(asyncio.to_thread(_sync, target))


def _read_root_directory(rootfs: Path) -> RootDirectory:
    found = os.stat(rootfs)
    try:
        lost_found = os.lstat(rootfs / "lost+found").st_mode
    except FileNotFoundError:
        lost_found = 0
    has_lost_found = stat.S_ISDIR(lost_found)
    return RootDirectory(
        mode=stat.S_IFDIR | stat.S_IMODE(found.st_mode),
        uid=found.st_uid,
        gid=found.st_gid,
        mtime_s=max(0, int(found.st_mtime)),
        has_lost_found=has_lost_found,
        stand_in="" if has_lost_found or not lost_found else f".lost+found.{secrets.token_hex(8)}",
    )


async def _with_stand_in(rootfs: Path, stand_in: str, scratch: Path) -> Path:
    """A second tree of the same files, with another name for lost+found. Raises ProcessFailed, OSError."""
    view = scratch / "view"
    await run(["cp", "-al", "--", str(rootfs), str(view)], timeout_s=None)
    os.rename(view / "lost+found", view / stand_in)
    return view


def _read_times(rootfs: Path) -> list[tuple[str, int]]:
    """Of all files, by path from the root directory; nothing is followed."""
    found = [("/", os.lstat(rootfs).st_mtime_ns)]
    folders = [("", os.fspath(rootfs))]
    while folders:
        inside, folder = folders.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                path = f"{inside}/{entry.name}"
                found.append((path, entry.stat(follow_symlinks=False).st_mtime_ns))
                if entry.is_dir(follow_symlinks=False):
                    folders.append((path, entry.path))
    return found


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
