"""Disks of images: their commands as text, and empty layers as QEMU's own program reads them."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from katapod.plan.qcow2 import CLUSTER_BYTES, Qcow2Plan, plan_empty_overlay
from katapod.plan.root_disk import RootDirectory, plan_disk_bytes, render_debugfs, render_mke2fs, render_times

GIB = 1 << 30


@pytest.mark.parametrize(
    ("content", "disk"), [(0, 32 * GIB), (1, 32 * GIB + (128 << 20)), (128 << 20, 32 * GIB + (128 << 20))]
)
def test_a_disk_has_room_to_write_beside_its_content(content: int, disk: int) -> None:
    assert plan_disk_bytes(content) == disk


def test_the_host_s_configuration_of_mke2fs_decides_nothing() -> None:
    argv = render_mke2fs(Path("/store/a b/rootfs"), Path("/store/tmp/disk"))
    assert argv[argv.index("-O") + 1].startswith("none,has_journal,")
    assert argv[-3:] == ["-d", "/store/a b/rootfs", "/store/tmp/disk"]
    assert {"-b", "-I", "-i", "-J"} <= set(argv)


def test_the_root_directory_is_made_like_the_image_s() -> None:
    root = RootDirectory(0o041777, 100000, 7, 1234567890, has_lost_found=False)
    assert render_debugfs(root) == (
        "rmdir /lost+found\n"
        "set_inode_field / mode 041777\n"
        "set_inode_field / uid 100000\n"
        "set_inode_field / gid 7\n"
        "set_inode_field / mtime @1234567890\n"
    )
    own = RootDirectory(0o040755, 0, 0, 0, has_lost_found=True)
    assert "lost+found" not in render_debugfs(own)


@pytest.mark.parametrize(
    ("path", "mtime_ns", "command"),
    [
        ("/a", 10**18, ""),
        ("/a b", 10**18 + 5, 'set_inode_field "/a b" mtime_extra 0x14\n'),
        ('/q"', 10**18 + 1, 'set_inode_field "/q""" mtime_extra 0x4\n'),
        ("/old", -1, f'set_inode_field "/old" mtime_extra {999_999_999 << 2:#x}\n'),
        ("/late", (1 << 31) * 10**9, 'set_inode_field "/late" mtime_extra 0x1\n'),
        ("/a\nquit", 10**18 + 5, ""),
    ],
)
def test_times_keep_what_mke2fs_leaves_out(path: str, mtime_ns: int, command: str) -> None:
    assert render_times([(path, mtime_ns)]) == command


def write(plan: Qcow2Plan, path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(plan.length_bytes)
        for offset, data in plan.pieces:
            file.seek(offset)
            file.write(data)


def test_an_empty_layer_has_no_tables_yet() -> None:
    plan = plan_empty_overlay(32 * GIB)
    assert plan.length_bytes == 4 * CLUSTER_BYTES
    assert [offset // CLUSTER_BYTES for offset, _ in plan.pieces] == [0, 1, 2]
    assert plan.describe() == "qcow2 overlay of 262144 bytes: 104 at 0, 8 at 65536, 8 at 131072"


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img")
@pytest.mark.parametrize("disk_bytes", [512, 512 << 20, (512 << 20) + 512, 32 * GIB, 1 << 42, 1 << 43])
def test_qemu_finds_no_fault_with_an_empty_layer(tmp_path: Path, disk_bytes: int) -> None:
    path = tmp_path / "layer"
    write(plan_empty_overlay(disk_bytes), path)
    checked = json.loads(subprocess.check_output(["qemu-img", "check", "--output=json", path], timeout=30))
    assert (checked["check-errors"], checked.get("leaks", 0), checked.get("corruptions", 0)) == (0, 0, 0)
    info = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", path], timeout=30))
    assert info["virtual-size"] == disk_bytes
    assert "backing-filename" not in info
