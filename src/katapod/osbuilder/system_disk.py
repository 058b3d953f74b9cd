"""Make the system disk of a User-mode Linux guest from the archive that dracut has packed.

User-mode Linux keeps the guest's memory in a file of the host, and an initrd would be in it twice: as it was read, and
unpacked. Of a disk the guest reads what it uses, and the host keeps one copy for all guests that have it open.
docs/adr/0048-uml-guest-image.md has the figures.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from katapod.host.process import ProcessFailed, find_program, run
from katapod.osbuilder.errors import OsbuilderError
from katapod.osbuilder.stage import in_thread

__all__ = ["make_system_disk"]

BLOCK = 4096  # bytes
INODE = 256  # bytes
SPARE = 4 * 1024 * 1024  # bytes: for the file system's own tables. What is not written is a hole in the file.
PACK_LIMIT_S = 120.0
# An image of the same files is the same file system: nothing of it is random.
_UUID = "6b617461-706f-6400-0000-000000000001"
_ENVIRONMENT = {"E2FSPROGS_FAKE_TIME": "1"}
_FEATURES = "^has_journal,^resize_inode,^metadata_csum,^64bit,^orphan_file"


async def make_system_disk(archive: Path, work: Path) -> Path:
    """An ext4 file system with the files of `archive`, a cpio archive that is not compressed; it lies below `work`.

    Owners are kept, so this needs root. Raises OsbuilderError, MissingProgram.
    """
    tree = work / "root"
    tree.mkdir()
    disk = work / "root.img"
    cpio = find_program("cpio", package="cpio")
    unpack = [cpio, "--extract", "--make-directories", "--preserve-modification-time", "--quiet", "-F", str(archive)]
    try:
        await run(unpack, cwd=tree, timeout_s=PACK_LIMIT_S)
        archive.unlink()
        inodes, size = await in_thread(lambda: _measure(tree))
        await run(_mkfs(tree, disk, inodes=inodes, size=size), env=_ENVIRONMENT, timeout_s=PACK_LIMIT_S)
        commands = work / "times"
        await in_thread(lambda: commands.write_text("".join(_times(tree))))
        debugfs = find_program("debugfs", package="e2fsprogs")
        await run([debugfs, "-w", "-f", str(commands), str(disk)], env=_ENVIRONMENT, timeout_s=PACK_LIMIT_S)
    except ProcessFailed as exc:
        raise OsbuilderError(f"cannot make the system disk: {exc}") from exc
    return disk


def _mkfs(tree: Path, disk: Path, *, inodes: int, size: int) -> list[str]:
    options = f"hash_seed={_UUID},lazy_itable_init=1,root_owner=0:0"
    argv = [find_program("mkfs.ext4", package="e2fsprogs"), "-q", "-F", "-O", _FEATURES, "-U", _UUID, "-E", options]
    argv += ["-b", str(BLOCK), "-I", str(INODE), "-N", str(inodes), "-m", "0", "-d", str(tree), str(disk)]
    return [*argv, str(size // BLOCK)]


def _times(tree: Path) -> Iterator[str]:
    """Commands of debugfs(8) for all times that are those of the build; when a file was modified is no such time."""
    for directory, directories, names in os.walk(tree):
        for name in (".", *directories, *names):
            path = os.path.join(directory, name)
            quoted = '"/' + os.path.relpath(path, tree).replace('"', '""') + '"'
            fields = ("ctime", "atime") if stat.S_ISREG(os.lstat(path).st_mode) else ("ctime", "atime", "mtime")
            yield from (f"set_inode_field {quoted} {field} @1\n" for field in fields)


def _measure(tree: Path) -> tuple[int, int]:
    """How many inodes, and how many bytes, a file system for `tree` has."""
    sizes = dict(_sizes(tree))
    inodes = len(sizes) + 16
    used = sum(-(-size // BLOCK) * BLOCK for size in sizes.values())
    return inodes, -(-(used + used // 16 + inodes * INODE + SPARE) // BLOCK) * BLOCK


def _sizes(tree: Path) -> Iterator[tuple[int, int]]:
    """(inode, bytes): what has several names is one."""
    for directory, _, names in os.walk(tree):
        for name in (".", *names):
            status = os.lstat(os.path.join(directory, name))
            yield status.st_ino, max(status.st_size, BLOCK if name == "." else 0)
