"""Marks of sandboxes at direct volumes."""

import os
from pathlib import Path

import pytest

from katapod.host.direct_volumes import (
    add_volume,
    forget_volumes,
    mark_volume,
    read_volume,
    remove_volume,
    sandbox_of_volume,
    unmark_volume,
)
from katapod.host.state import StateStore
from katapod.model.errors import InvalidState, KatapodError, NotFound
from katapod.model.ids import ContainerId
from katapod.model.layout import Layout
from katapod.model.record import SandboxRecord

INFO = b'{"volume-type": "block", "device": "/dev/x", "fstype": "ext4"}'


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(
        state_root=tmp_path / "sbs",
        vm_root=tmp_path / "vm",
        share_root=tmp_path / "shared" / "sandboxes",
        data_root=tmp_path / "data",
    )


def test_a_volume_from_its_announcement_to_its_end(layout: Layout) -> None:
    assert read_volume(layout, "/vol") is None
    add_volume(layout, "/vol", INFO)
    add_volume(layout, "/vol", INFO)
    folder = layout.share_root.parent / "direct-volumes" / "L3ZvbA=="
    assert (folder.stat().st_mode & 0o777, (folder / "mountInfo.json").stat().st_mode & 0o777) == (0o700, 0o600)
    found = read_volume(layout, "/vol")
    assert found is not None
    assert found.device == "/dev/x"
    assert read_volume(layout, "/other") is None
    assert read_volume(layout, "/" + "a" * 4000) is None
    with pytest.raises(NotFound, match="cannot find a sandbox"):
        sandbox_of_volume(layout, "/vol")
    mark_volume(layout, "/vol", "s1")
    assert sandbox_of_volume(layout, "/vol") == "s1"
    unmark_volume(layout, "/vol", "s1")
    mark_volume(layout, "/vol", "s2")
    forget_volumes(layout, "s2")
    assert os.listdir(folder) == ["mountInfo.json"]
    remove_volume(layout, "/vol")
    remove_volume(layout, "/vol")
    with pytest.raises(NotFound, match="cannot find the direct volume"):
        sandbox_of_volume(layout, "/vol")


def test_what_is_no_volume_is_in_nobodys_way(layout: Layout) -> None:
    add_volume(layout, "/vol", INFO)
    root = layout.share_root.parent / "direct-volumes"
    (root / "stray").touch()
    forget_volumes(layout, "s1")
    for one in root.rglob("*"):
        if one.is_file():
            one.unlink()
    (root / "L3ZvbA==").rmdir()
    root.rmdir()
    root.touch()  # a file where the folder should be
    forget_volumes(layout, "s1")


def test_a_damaged_announcement_names_file_and_volume(layout: Layout) -> None:
    add_volume(layout, "/vol", INFO)
    (layout.share_root.parent / "direct-volumes/L3ZvbA==/mountInfo.json").write_bytes(b"{")
    with pytest.raises(KatapodError, match=r"mountInfo\.json, the direct volume /vol"):
        read_volume(layout, "/vol")


def test_only_a_living_sandbox_keeps_others_off(layout: Layout) -> None:
    add_volume(layout, "/vol", INFO)
    record = SandboxRecord(ContainerId("s1"), created_at=1.0, supervisor_pid=os.getpid(), boot_id="b")
    lock = StateStore(layout).create(record)
    mark_volume(layout, "/vol", "s1")
    with pytest.raises(InvalidState, match="sandbox s1 has it"):
        mark_volume(layout, "/vol", "s2")
    os.close(lock)
    mark_volume(layout, "/vol", "s2")
    assert sandbox_of_volume(layout, "/vol") == "s2"
