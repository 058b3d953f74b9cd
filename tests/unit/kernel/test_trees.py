"""Removal of, and walks through, trees that were made to do harm."""

import os
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from katapod.kernel.trees import remove_tree, walk_tree

DEEP = 3000
"""Directories in each other: more than Python can recurse, and with these names more than PATH_MAX."""


def make_deep(top: Path, depth: int, name: str = "d" * 20) -> None:
    here = os.open(top, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=here)
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=here))
        below = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def tree() -> Iterator[Path]:
    """In memory: thousands of directories are slow to make on a disk."""
    with tempfile.TemporaryDirectory(prefix="katapod-trees-", dir="/dev/shm") as place:
        found = Path(place, "tree")
        found.mkdir()
        yield found


def test_a_tree_deeper_than_recursion_and_path_max(tree: Path) -> None:
    make_deep(tree, DEEP)
    remove_tree(str(tree))
    assert not tree.exists()
    assert list(tree.parent.iterdir()) == []


def test_descriptors_do_not_grow_with_the_tree(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_deep(tree, 200)
    make_deep(tree, 200, name="e")
    most, before = 0, open_descriptors()
    original = os.rmdir

    def counted(*args: object, **kwargs: object) -> None:
        nonlocal most
        most = max(most, open_descriptors())
        original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "rmdir", counted)
    remove_tree(str(tree))
    assert not tree.exists()
    assert most - before <= 5
    assert open_descriptors() == before


def test_nothing_is_followed(tree: Path) -> None:
    precious = tree.parent / "precious"
    precious.mkdir()
    (precious / "kept").write_text("here")
    (tree / "link").symlink_to(precious)
    (tree / "dangling").symlink_to("/nowhere")
    os.mkfifo(tree / "fifo")
    below = tree / "below"
    below.mkdir()
    (below / "link").symlink_to(precious, target_is_directory=True)
    (below / "..name").mkdir()
    remove_tree(str(tree))
    assert not tree.exists()
    assert (precious / "kept").read_text() == "here"


def test_what_is_no_directory_is_removed_itself(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    link = tmp_path / "link"
    link.symlink_to(precious)
    remove_tree(str(link))
    remove_tree(str(link))
    assert not link.is_symlink()
    assert precious.is_dir()


def test_modes_hinder_nothing(tree: Path) -> None:
    (tree / "work" / "work").mkdir(parents=True)
    (tree / "work" / "work" / "file").touch(mode=0)
    (tree / "work" / "work").chmod(0)
    (tree / "work").chmod(0)
    remove_tree(str(tree))
    assert not tree.exists()


def test_the_rest_goes_when_something_cannot(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("a", "b/below", "c"):
        (tree / place).mkdir(parents=True)
        (tree / place / "file").touch()
    original = os.unlink

    def refuses(name: str, *, dir_fd: int | None = None) -> None:
        if os.path.basename(os.readlink(f"/proc/self/fd/{dir_fd}")) == "a":
            raise OSError(5, "Input/output error")
        original(name, dir_fd=dir_fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuses)
        with pytest.raises(OSError, match="Input/output error: 'file'"):
            remove_tree(str(tree))
    assert [str(path.relative_to(tree)) for path in sorted(tree.rglob("*"))] == ["a", "a/file"]
    remove_tree(str(tree))  # what hindered it is over
    assert not tree.exists()


def test_a_limit_of_time_is_kept_and_the_next_call_goes_on(tree: Path) -> None:
    for number in range(100):
        (tree / str(number)).touch()
    with pytest.raises(TimeoutError):
        remove_tree(str(tree), deadline=time.monotonic() - 1)
    assert len(list(tree.iterdir())) == 100
    remove_tree(str(tree), deadline=time.monotonic() + 60)
    assert not tree.exists()


def test_two_remove_and_a_third_fills_meanwhile(tree: Path) -> None:
    ended = threading.Event()
    failures: list[BaseException] = []

    def fill() -> None:
        number = 0
        while not ended.is_set() and number < 3000:
            number += 1
            try:
                (tree / str(number % 7) / str(number)).mkdir(parents=True)
            except OSError:
                return  # the tree has gone

    def remove() -> None:
        try:
            remove_tree(str(tree))
        except BaseException as exc:
            failures.append(exc)

    make_deep(tree, 300)
    filling = threading.Thread(target=fill)
    removing = [threading.Thread(target=remove) for _ in range(2)]
    for thread in (filling, *removing):
        thread.start()
    for thread in removing:
        thread.join()
    ended.set()
    filling.join()
    assert all(isinstance(failure, OSError) for failure in failures)  # it may be filled as it is removed: no more
    remove_tree(str(tree))
    assert not tree.exists()


MEASURE = """
import resource, sys
from katapod.kernel.trees import remove_tree
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
remove_tree(sys.argv[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_entries(tree: Path) -> None:
    for place in range(20):
        folder = os.open(tree, os.O_RDONLY)
        os.mkdir(str(place), dir_fd=folder)
        inner = os.open(str(place), os.O_RDONLY, dir_fd=folder)
        for number in range(1000):
            os.symlink("x", f"{number:0200}", dir_fd=inner)
        os.close(inner)
        os.close(folder)
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tree)], capture_output=True, text=True, check=True)
    assert not tree.exists()
    assert int(done.stdout) < 2048  # KiB; the names alone are 4 MB


def test_a_walk_sees_children_before_their_parent_and_goes_any_depth(tree: Path) -> None:
    make_deep(tree, DEEP)
    (tree / "link").symlink_to("/")
    seen = {"file": 0, "d" * 20: 0, "link": 0}
    for folder, name in walk_tree(str(tree)):
        seen[name] += 1
        if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            os.rmdir(name, dir_fd=folder)
        else:
            os.unlink(name, dir_fd=folder)
    assert seen == {"file": DEEP, "d" * 20: DEEP, "link": 1}
    assert list(tree.iterdir()) == []


def test_a_walk_does_not_leave_the_tree_by_a_directory_that_is_moved(tree: Path) -> None:
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "b" / "file").touch()
    elsewhere = tree.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").touch()
    visited = []
    with pytest.raises(OSError, match="was moved"):  # noqa: PT012 - in the midst of it
        for _, name in walk_tree(str(tree)):
            visited.append(name)
            (tree / "a" / "b").rename(elsewhere / "b")
    assert visited == ["file"]


def test_below_a_file_there_is_nothing_to_remove(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    remove_tree(str(tmp_path / "file" / "name"))
    remove_tree(str(tmp_path / "file" / "name" / "deeper"))
    assert (tmp_path / "file").exists()
    (tmp_path / "link").symlink_to(tmp_path)
    remove_tree(str(tmp_path / "link" / "file"))
    assert not (tmp_path / "file").exists()
