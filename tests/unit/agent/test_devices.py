"""What of the guest's devices a privileged container gets."""

import os
from pathlib import Path

import pytest

from katapod.agent import devices
from katapod.rpc.pb import oci_pb2

DEVNAME = "# static\nfuse fuse c10:229\ntun net/tun c10:200\nloop loop-control c10:237\nhalf line\n"


def rules(*entries: tuple[bool, str, int, int, str]) -> oci_pb2.LinuxResources:
    found = oci_pb2.LinuxResources()
    for allow, kind, major, minor, access in entries:
        found.Devices.add(Allow=allow, Type=kind, Major=major, Minor=minor, Access=access)
    return found


@pytest.mark.parametrize(
    ("entries", "wanted"),
    [
        ([(True, "", 0, 0, "rwm")], True),
        ([(False, "a", 0, 0, "rwm"), (True, "a", 0, 0, "mrw")], True),
        ([], False),
        ([(False, "", 0, 0, "rwm")], False),
        ([(True, "c", 0, 0, "rwm")], False),
        ([(True, "a", 0, 0, "m")], False),
        ([(True, "", 10, 229, "rwm")], False),
    ],
)
def test_who_may_open_all(entries: list[tuple[bool, str, int, int, str]], wanted: bool) -> None:
    assert devices.opens_all(rules(*entries)) is wanted


def test_nodes_whose_drivers_come_when_they_are_opened() -> None:
    found = devices.static_nodes(DEVNAME)
    assert found[:3] == [("fuse", "c", 10, 229), ("net/tun", "c", 10, 200), ("loop-control", "c", 10, 237)]
    assert found[3:] == [(f"loop{number}", "b", 7, number) for number in range(8)]


def test_devices_are_the_guests_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a /dev without device nodes come the static ones; files, links and what crun makes itself do not."""
    for name in ("pts", "shm", "net"):
        (tmp_path / name).mkdir()
    (tmp_path / "log").touch()
    (tmp_path / "fd").symlink_to("/proc/self/fd")
    monkeypatch.setattr(devices, "DEV", str(tmp_path))
    monkeypatch.setattr(devices, "_text_of", lambda path: DEVNAME)
    spec = oci_pb2.Spec()
    spec.Linux.Devices.add(Path=f"{tmp_path}/fuse", Type="c", Major=1, Minor=2)
    devices.add_guest_devices(spec)
    found = {os.path.relpath(d.Path, tmp_path): (d.Type, d.Major, d.Minor) for d in spec.Linux.Devices}
    assert found["fuse"] == ("c", 1, 2), "what the container was given by name stays"
    assert found["net/tun"] == ("c", 10, 200)
    assert set(found) == {"fuse", "net/tun", "loop-control", *(f"loop{number}" for number in range(8))}


@pytest.mark.parametrize(
    ("behind", "wanted"),
    [
        ("/dev/null", {"tty0", "tty1", "tty63", "ttyS0", "tty"}),
        ("/nothing", {"ttyS0", "tty"}),
    ],
)
def test_virtual_consoles_only_where_one_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behind: str, wanted: set[str]
) -> None:
    (tmp_path / "tty1").symlink_to(behind)
    numbers = {"tty0": (4, 0), "tty1": (4, 1), "tty63": (4, 63), "ttyS0": (4, 64), "tty": (5, 0)}
    nodes = {f"{tmp_path}/{name}": ("c", os.makedev(*number), 0o600) for name, number in numbers.items()}
    monkeypatch.setattr(devices, "DEV", str(tmp_path))
    monkeypatch.setattr(devices, "_nodes_below", lambda path: nodes)
    monkeypatch.setattr(devices, "_text_of", lambda path: "")
    spec = oci_pb2.Spec()
    devices.add_guest_devices(spec)
    assert {os.path.basename(device.Path) for device in spec.Linux.Devices} == wanted
