"""What is copied out of a container: made where it was asked for, or refused."""

import io
import os
import tarfile
from pathlib import Path

import pytest

from katapod.host.untar import copy_without, pack, unpack
from katapod.model.errors import KatapodError


def stream(*members: tuple[str, bytes | str, int]) -> io.BytesIO:
    """(name, content or what a link says, type) each."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content, kind in members:
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode, entry.mtime = bytes([kind]), 0o4755, 1000
            if isinstance(content, bytes):
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
            else:
                entry.linkname = content
                archive.addfile(entry)
    out.seek(0)
    return out


FILE, LINK, SYMLINK, DEVICE, DIRECTORY = tarfile.REGTYPE[0], tarfile.LNKTYPE[0], tarfile.SYMTYPE[0], ord("3"), ord("5")


def test_there_and_back(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "file").write_text("content")
    (source / "sub" / "file").chmod(0o640)
    (source / "link").symlink_to("sub/file")
    os.link(source / "sub" / "file", source / "hard")
    out = io.BytesIO()
    pack(source, "source", out)
    target = tmp_path / "target"
    target.mkdir()
    out.seek(0)
    assert unpack(out, target, "source", "copy") == 5
    assert (target / "copy" / "sub" / "file").read_text() == "content"
    assert (target / "copy" / "sub" / "file").stat().st_mode & 0o7777 == 0o640
    assert os.readlink(target / "copy" / "link") == "sub/file"
    assert (target / "copy" / "hard").read_text() == "content"


def test_what_is_in_a_directory(tmp_path: Path) -> None:
    members = (("./", "", DIRECTORY), ("./a", b"1", FILE), ("./sub", "", DIRECTORY), ("./sub/b", b"2", FILE))
    unpack(stream(*members), tmp_path, ".")
    assert ((tmp_path / "a").read_bytes(), (tmp_path / "sub" / "b").read_bytes()) == (b"1", b"2")


def test_a_file_replaces_one_and_has_plain_rights(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    unpack(stream(("x", b"new", FILE)), tmp_path, "x")
    assert (tmp_path / "x").read_text() == "new"
    assert (tmp_path / "x").stat().st_mode & 0o7777 == 0o755


@pytest.mark.parametrize(
    ("members", "cause"),
    [
        ([("y", b"", FILE)], "it is not below x"),
        ([("../y", b"", FILE)], "it leads out"),
        ([("x/../../y", b"", FILE)], "it leads out"),
        ([("/etc/y", b"", FILE)], "it is not below x"),
        ([("x", "", DIRECTORY), ("x/l", "OUTSIDE", SYMLINK), ("x/l/y", b"", FILE)], "it leads through a link"),
        ([("x", "OUTSIDE", SYMLINK), ("x/y", b"", FILE)], "it leads through a link"),
        ([("x", "", DEVICE)], "devices are not copied"),
        ([("x", "y", LINK)], "it is not below x"),
        ([("x", "", DIRECTORY), ("x/l", "x/s", LINK)], "No such file"),
    ],
)
def test_what_leads_elsewhere_is_refused(
    tmp_path: Path, members: list[tuple[str, bytes | str, int]], cause: str
) -> None:
    outside, target = tmp_path / "outside", tmp_path / "target"
    outside.mkdir()
    target.mkdir()
    given = [(name, str(outside) if content == "OUTSIDE" else content, kind) for name, content, kind in members]
    with pytest.raises(KatapodError, match=cause):
        unpack(stream(*given), target, "x")
    assert list(outside.iterdir()) == []


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("kept")
    target = tmp_path / "target"
    target.mkdir()
    (target / "x").symlink_to(outside)
    unpack(stream(("x", b"new", FILE)), target, "x")
    assert (outside.read_text(), (target / "x").read_text()) == ("kept", "new")


def test_what_is_mounted_is_left_out() -> None:
    out = io.BytesIO()
    members = (
        ("srv", "", DIRECTORY),
        ("srv/data", "", DIRECTORY),
        ("srv/data/x", b"x", FILE),
        ("srv/kept", b"k", FILE),
    )
    copy_without(stream(*members), out, {"srv/data", "proc"})
    out.seek(0)
    with tarfile.open(fileobj=out) as archive:
        assert archive.getnames() == ["srv", "srv/data", "srv/kept"]


def test_what_is_no_archive(tmp_path: Path) -> None:
    with pytest.raises(KatapodError, match="cannot copy to"):
        unpack(io.BytesIO(b"no tar"), tmp_path, "x")
    with pytest.raises(KatapodError, match="No such file"):
        pack(tmp_path / "none", "none", io.BytesIO())
