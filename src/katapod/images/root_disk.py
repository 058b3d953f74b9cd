"""An image of the store as a read-only disk, beside its unpacked files.

Made with e2fsprogs when a container first needs it. No file system is mounted here: the host's kernel must not
interpret the content of images.
"""

import asyncio
import errno
import os
import stat
from pathlib import Path

from katapod.host.process import ProcessFailed, find_program, run
from katapod.images.errors import ImageError
from katapod.model.tokens import random_hex
from katapod.plan.root_disk import RootDirectory, plan_disk_bytes, render_debugfs, render_mke2fs, render_times
from katapod.tasks import finish

__all__ = ["make_root_disk"]

PACKAGE = "e2fsprogs"
PATH_MAX_BYTES = 1000
"""Of a path in an image. mke2fs 1.47.0, which runs as root on the host, writes one byte past its buffer for a path of
1020, 2040 or 4080 bytes; this limit avoids that."""


async def make_root_disk(rootfs: Path, target: Path, *, content_bytes: int, scratch: Path) -> None:
    """Make `target`, a disk with the files of `rootfs`, and sync it.

    `scratch` is a directory for temporary files. Raises MissingProgram, ProcessFailed, OSError; ImageError for an image
    that mke2fs must not be given.
    """
    mke2fs = find_program("mke2fs", package=PACKAGE)
    debugfs = find_program("debugfs", package=PACKAGE)
    with open(target, "xb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.truncate(plan_disk_bytes(content_bytes))
    if (longest := await finish(asyncio.to_thread(_longest_path, rootfs))) > PATH_MAX_BYTES:
        raise ImageError(
            f"cannot make a disk of the image: it has a path of {longest} bytes, more than {PATH_MAX_BYTES}",
            hint="the image is fine: it is shared by virtio-fs instead",
        )
    root = _read_root_directory(rootfs)
    source = await _with_stand_in(rootfs, root.stand_in, scratch) if root.stand_in else rootfs
    _, *arguments = render_mke2fs(source, target)
    try:
        await run([mke2fs, *arguments], timeout_s=None)
    except ProcessFailed as exc:
        if os.strerror(errno.ENOSPC) in exc.stderr:  # its exit status means nothing
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target)) from exc
        raise
    commands = scratch / "debugfs"
    times = await finish(asyncio.to_thread(_read_times, rootfs), name="read-times")
    commands.write_bytes(os.fsencode(render_debugfs(root) + render_times(times)))  # names are in place now
    argv = [debugfs, "-w", "-f", str(commands), str(target)]
    done = await run(argv, timeout_s=None)
    # its exit status does not reflect the commands; on standard error there is one line with its version
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
        stand_in="" if has_lost_found or not lost_found else f".lost+found.{random_hex(8)}",
    )


async def _with_stand_in(rootfs: Path, stand_in: str, scratch: Path) -> Path:
    """A copy of the tree with hard links, in which lost+found has another name. Raises ProcessFailed, OSError."""
    view = scratch / "view"
    await run(["cp", "-al", "--", str(rootfs), str(view)], timeout_s=None)
    os.rename(view / "lost+found", view / stand_in)
    return view


def _longest_path(root: Path) -> int:
    """In bytes, counting the leading slash that stands for `root`. Raises OSError."""
    longest, pending = 1, [(os.fsencode(root), 0)]
    while pending:
        directory, length = pending.pop()
        with os.scandir(directory) as entries:
            for entry in entries:
                here = length + 1 + len(entry.name)
                longest = max(longest, here)
                if here <= PATH_MAX_BYTES and entry.is_dir(follow_symlinks=False):
                    pending.append((entry.path, here))
    return longest


def _read_times(rootfs: Path) -> list[tuple[str, int]]:
    """All files by path from the root directory, without following links."""
    found = [("/", os.lstat(rootfs).st_mtime_ns)]
    directories = [("", os.fspath(rootfs))]
    while directories:
        inside, directory = directories.pop()
        with os.scandir(directory) as entries:
            for entry in entries:
                path = f"{inside}/{entry.name}"
                found.append((path, entry.stat(follow_symlinks=False).st_mtime_ns))
                if entry.is_dir(follow_symlinks=False):
                    directories.append((path, entry.path))
    return found


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
