"""CopyFile: chunks, kinds of files, and no way out of the shared tree."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from katapod.agent.files import copy_into
from katapod.agent.tree import remove_bundle
from katapod.rpc.pb import agent_pb2
from katapod.rpc.status import RpcError, StatusCode


def request(
    path: str, data: bytes = b"", *, mode: int = 0o100644, size: int = -1, offset: int = 0
) -> agent_pb2.CopyFileRequest:
    return agent_pb2.CopyFileRequest(
        path=path,
        data=data,
        file_mode=mode,
        dir_mode=0o750,
        file_size=len(data) if size < 0 else size,
        offset=offset,
        uid=os.getuid(),
        gid=os.getgid(),
    )


def test_file_in_chunks_appears_when_whole(tmp_path: Path) -> None:
    target = tmp_path / "a/b/file"
    copy_into(str(tmp_path), request(str(target), b"hello ", size=11, mode=0o100640))
    assert not target.exists()
    copy_into(str(tmp_path), request(str(target), b"world", size=11, offset=6, mode=0o100640))
    assert target.read_bytes() == b"hello world"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert stat.S_IMODE(target.parent.stat().st_mode) == 0o750
    assert os.listdir(target.parent) == ["file"]


def test_empty_file_directory_and_link(tmp_path: Path) -> None:
    root = str(tmp_path)
    copy_into(root, request(f"{root}/empty"))
    copy_into(root, request(f"{root}/folder", mode=0o040711))
    copy_into(root, request(f"{root}/link", b"/anywhere", mode=0o120777, size=9))
    assert (tmp_path / "empty").read_bytes() == b""
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o711
    assert os.readlink(tmp_path / "link") == "/anywhere"


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "{root}", "{root}/", "{root}/../x", "{root}/a/../../x", "{root}//x", "{root}x/y"]
)
def test_paths_elsewhere_are_refused(tmp_path: Path, path: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with pytest.raises(RpcError) as caught:
        copy_into(str(root), request(path.format(root=root), b"x"))
    assert caught.value.code == StatusCode.INVALID_ARGUMENT
    assert sorted(os.listdir(tmp_path)) == ["root"]


def test_links_on_the_way_are_not_followed(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (root / "link").symlink_to(outside)
    with pytest.raises(OSError, match=r"link"):
        copy_into(str(root), request(f"{root}/link/x", b"x"))
    assert os.listdir(outside) == []


def test_a_link_in_the_files_place_is_replaced(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("safe")
    root = tmp_path / "root"
    root.mkdir()
    (root / "file").symlink_to(victim)
    (root / ".file.tmp").symlink_to(victim)
    copy_into(str(root), request(f"{root}/file", b"new"))
    assert victim.read_text() == "safe"
    assert (root / "file").read_text() == "new"


@pytest.mark.parametrize(("size", "offset"), [(3, 4), (5, -1)])
def test_senseless_offsets(tmp_path: Path, size: int, offset: int) -> None:
    with pytest.raises(RpcError):
        copy_into(str(tmp_path), request(f"{tmp_path}/f", b"abc", size=size, offset=offset))


def test_bundle_with_a_root_in_use_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "bundle/rootfs").mkdir(parents=True)
    precious = tmp_path / "bundle/rootfs/image"
    precious.write_text("data")
    with pytest.raises(OSError):
        remove_bundle(str(tmp_path / "bundle"))
    assert precious.read_text() == "data"
    precious.unlink()
    (tmp_path / "bundle/config.json").write_text("{}")
    remove_bundle(str(tmp_path / "bundle"))
    assert os.listdir(tmp_path) == []
