"""The system disk of a User-mode Linux guest: what the archive has, and nothing that differs between builds."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from katapod.osbuilder.errors import OsbuilderError
from katapod.osbuilder.system_disk import make_system_disk
from kit.loop_time import until

needs_tools = pytest.mark.skipif(
    not all(shutil.which(name, path="/usr/sbin:/sbin:/usr/bin:/bin") for name in ("cpio", "mkfs.ext4", "debugfs")),
    reason="needs cpio and e2fsprogs",
)


def archive(work: Path) -> Path:
    tree = work / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\n")
    (tree / "etc/a name").write_text("with a space\n")
    (tree / "tmp").mkdir()
    (tree / "tmp").chmod(0o1777)
    (tree / "big").write_bytes(b"x" * 1_000_000)
    (tree / "same").hardlink_to(tree / "big")
    (tree / "link").symlink_to("etc/passwd")
    for path in (*tree.rglob("*"), tree):
        os.utime(path, (1, 1), follow_symlinks=False)
    names = "\n".join(sorted(str(path.relative_to(tree)) for path in tree.rglob("*")))
    packed = work / "archive"
    with packed.open("wb") as handle:
        subprocess.run(
            ["cpio", "-o", "-H", "newc", "--quiet"], cwd=tree, input=names.encode(), stdout=handle, check=True
        )
    return packed


def debugfs(disk: Path, command: str) -> str:
    program = shutil.which("debugfs", path="/usr/sbin:/sbin:/usr/bin") or "debugfs"
    return subprocess.run([program, "-R", command, str(disk)], capture_output=True, text=True, check=True).stdout


@needs_tools
async def test_the_disk_has_the_files_of_the_archive(tmp_path: Path) -> None:
    packed = archive(tmp_path)
    (tmp_path / "work").mkdir()

    disk = await make_system_disk(packed, tmp_path / "work")

    assert debugfs(disk, "cat /etc/passwd") == "root:x:0:0::/:/bin/sh\n"
    assert "Mode:  01777" in debugfs(disk, "stat /tmp")
    assert "Links: 2" in debugfs(disk, "stat /big")
    assert "etc/passwd" in debugfs(disk, "stat /link")
    assert disk.stat().st_blocks * 512 < 1_700_000, "a file with two names is there once, and holes are holes"


async def next_second() -> None:
    """Times on the disk are whole seconds."""
    now = int(time.time())
    await until(lambda: int(time.time()) > now)


@needs_tools
async def test_the_same_archive_makes_the_same_disk(tmp_path: Path) -> None:
    disks = []
    for name in ("a", "b"):
        work = tmp_path / name
        work.mkdir()
        packed = archive(work)
        (work / "work").mkdir()
        disks.append(await make_system_disk(packed, work / "work"))
        await next_second()

    assert disks[0].read_bytes() == disks[1].read_bytes()


@needs_tools
async def test_a_broken_archive_is_an_error_of_the_builder(tmp_path: Path) -> None:
    (tmp_path / "archive").write_bytes(b"no archive")

    with pytest.raises(OsbuilderError, match=r"cannot make the system disk: .*cpio"):
        await make_system_disk(tmp_path / "archive", tmp_path)
