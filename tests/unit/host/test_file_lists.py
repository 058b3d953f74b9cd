"""Trees of files as values: a real directory, and the tar of it, which say the same."""

import io
import os
import tarfile
from pathlib import Path

import pytest

from katapod.host import file_lists
from katapod.host.file_lists import entries_of_tar, entries_of_tree
from katapod.model.errors import KatapodError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "etc" / "empty").mkdir(parents=True)
    (root / "etc" / "file").write_text("content")
    (root / "etc" / "file").chmod(0o4750)
    os.link(root / "etc" / "file", root / "name")
    (root / "link").symlink_to("etc/file")
    os.mkfifo(root / "fifo", 0o600)
    return root


def archive(root: Path, kind: int = tarfile.GNU_FORMAT) -> io.BytesIO:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=kind) as out:
        out.add(root, ".")
    made.seek(0)
    return made


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tree_and_its_tar_are_alike(tree: Path, kind: int) -> None:
    found = entries_of_tree(tree)
    assert sorted(found) == ["etc", "etc/empty", "etc/file", "fifo", "link", "name"]
    assert found["etc/file"] == found["name"]
    assert (found["etc/file"].size, found["etc/file"].mode, found["link"].target) == (7, 0o4750, "etc/file")
    assert entries_of_tar(archive(tree, kind)) == found


def test_bad_archives(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = io.BytesIO()
    with tarfile.open(fileobj=link, mode="w") as out:
        member = tarfile.TarInfo("name")
        member.type, member.linkname = tarfile.LNKTYPE, "nothing"
        out.addfile(member)
    link.seek(0)
    for stream in (io.BytesIO(b"no archive at all"), link):
        with pytest.raises(KatapodError, match="cannot read the container's files"):
            entries_of_tar(stream)
    monkeypatch.setattr(file_lists, "ENTRIES_MAX", 2)
    with pytest.raises(KatapodError, match="there are too many"):
        entries_of_tar(archive(tree))


def test_a_tree_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(KatapodError, match="cannot read"):
        entries_of_tree(tmp_path / "none")
