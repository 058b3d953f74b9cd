"""Removal of trees with what only root can make: flags that forbid it, and mount points."""

import itertools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from katapod.kernel.mount import MS_BIND, mount, umount
from katapod.kernel.trees import remove_tree


@pytest.fixture
def ext4(tmp_path: Path) -> Iterator[Path]:
    """A small file system that knows chattr(1)."""
    image, point = tmp_path / "ext4", tmp_path / "mnt"
    with image.open("wb") as file:
        file.truncate(8 << 20)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", str(image)], check=True)
    point.mkdir()
    subprocess.run(["mount", "-o", "loop", str(image), str(point)], check=True)
    yield point
    umount(str(point))


def test_immutable_and_append_only(ext4: Path) -> None:
    tree = ext4 / "tree"
    (tree / "folder" / "below").mkdir(parents=True)
    (tree / "folder" / "below" / "file").touch()
    (tree / "file").touch()
    (tree / "log").touch()
    for flag, path in (("+i", tree / "folder/below/file"), ("+i", tree / "folder/below"), ("+a", tree / "log"),
                       ("+i", tree / "file"), ("+i", tree / "folder"), ("+a", tree)):  # fmt: skip
        subprocess.run(["chattr", flag, str(path)], check=True)
    remove_tree(str(tree))
    assert not tree.exists()


def test_a_full_file_system(ext4: Path) -> None:
    tree = ext4 / "tree"
    for number in range(300):
        (tree / "wide" / f"{number:0>100}" / "below").mkdir(parents=True)
    with pytest.raises(OSError, match="No space"), (tree / "filler").open("wb", buffering=0) as file:
        file.writelines(itertools.repeat(bytes(4096)))
    remove_tree(str(tree))
    assert not tree.exists()


def test_mount_points_are_not_entered(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    (precious / "below").mkdir(parents=True)
    (precious / "below" / "kept").touch()
    tree = tmp_path / "tree"
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "file").touch()
    mount(str(precious), str(tree / "a" / "b"), None, MS_BIND)  # the same file system: no other device number
    try:
        with pytest.raises(OSError, match="busy"):
            remove_tree(str(tree))
        assert (precious / "below" / "kept").exists()
        assert not (tree / "a" / "file").exists()
    finally:
        umount(str(tree / "a" / "b"))
    remove_tree(str(tree))
    assert not os.path.lexists(tree)
    assert (precious / "below" / "kept").exists()
