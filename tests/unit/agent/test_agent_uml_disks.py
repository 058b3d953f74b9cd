"""Places of disks under User-mode Linux, with a sysfs of files."""

from pathlib import Path

import pytest

from katapod.agent import uml_disks
from katapod.agent.uml_disks import bind_disk, bind_place, is_uml_place, unbind


@pytest.mark.parametrize(
    ("source", "is_one"),
    [
        ("virtio-uml.3", True),
        ("virtio-uml.25", True),
        ("virtio-uml.", False),
        ("virtio-uml.1/..", False),
        ("virtio-uml.1234", False),
        ("virtio-uml.\u0663", False),
        ("02/01", False),
        ("/dev/vda", False),
        ("3", False),
    ],
)
def test_what_names_a_place(source: str, is_one: bool) -> None:
    assert is_uml_place(source) is is_one


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(uml_disks, "DRIVER", str(tmp_path / "driver"))
    monkeypatch.setattr(uml_disks, "DEVICES", str(tmp_path / "devices"))
    (tmp_path / "driver").mkdir()
    (tmp_path / "devices" / "virtio-uml.3").mkdir(parents=True)
    return tmp_path


def test_a_disk_is_found_once_its_driver_is_bound(sysfs: Path) -> None:
    assert bind_disk("virtio-uml.3") == "", "the kernel has not made it yet"
    assert (sysfs / "driver" / "bind").read_text() == "virtio-uml.3"
    (sysfs / "driver" / "bind").unlink()
    (sysfs / "driver" / "virtio-uml.3").mkdir()
    (sysfs / "devices" / "virtio-uml.3" / "virtio5" / "block" / "vdb").mkdir(parents=True)
    assert bind_disk("virtio-uml.3") == "vdb"
    assert not (sysfs / "driver" / "bind").exists(), "it is bound already"


def test_only_what_is_bound_is_unbound(sysfs: Path) -> None:
    unbind("virtio-uml.3")
    assert not (sysfs / "driver" / "unbind").exists()
    (sysfs / "driver" / "virtio-uml.3").mkdir()
    unbind("virtio-uml.3")
    assert (sysfs / "driver" / "unbind").read_text() == "virtio-uml.3"


def test_nobody_behind_a_place_is_no_error_and_all_else_is(monkeypatch: pytest.MonkeyPatch, sysfs: Path) -> None:
    errors: list[OSError] = []

    def refuse(path: str, text: str) -> None:
        raise errors.pop()

    monkeypatch.setattr(uml_disks, "_write", refuse)
    for error in (FileNotFoundError(2, "x"), ConnectionRefusedError(111, "x")):
        errors.append(error)
        assert bind_disk("virtio-uml.3") == ""
    errors.append(OSError(19, "No such device"))
    with pytest.raises(OSError, match="No such device"):
        bind_disk("virtio-uml.99")


def test_a_place_without_a_disk_is_bound_too(sysfs: Path) -> None:
    assert bind_place("virtio-uml.1")
    assert (sysfs / "driver" / "bind").read_text() == "virtio-uml.1"
    (sysfs / "driver" / "bind").unlink()
    (sysfs / "driver" / "virtio-uml.1").mkdir()
    assert bind_place("virtio-uml.1")
    assert not (sysfs / "driver" / "bind").exists(), "it is bound already"
