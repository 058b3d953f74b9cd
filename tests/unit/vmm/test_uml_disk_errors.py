"""What the guest's kernel says of its disks, and what the host makes of it."""

import os
from pathlib import Path

import pytest

from katapod.vmm.devices import Disk
from katapod.vmm.protocol import DiskError
from katapod.vmm.uml import disk_errors
from katapod.vmm.uml.disk_errors import ConsoleWatch, disk_error_of, name_of, parse_disk_error

WRITE = b"I/O error, dev vda, sector 2048 op 0x1:(WRITE) flags 0x4800 phys_seg 1 prio class 2"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (WRITE, ("vda", True)),
        (b"[   12.5] " + WRITE.replace(b"vda", b"vdb").replace(b"WRITE", b"DISCARD"), ("vdb", True)),
        (b"I/O error, dev vdc, sector 0 op 0x0:(READ) flags 0x0", ("vdc", False)),
        (b"Buffer I/O error on dev vda, logical block 5, lost async page write", None),
        (b"I/O error, dev ubda, sector 0 op 0x0:(READ) flags 0x0", None),
        (b"I/O error, dev vda1, sector 0 op 0x0:(READ) flags 0x0", None),
        (b"", None),
    ],
)
def test_lines_of_the_block_layer(line: bytes, found: tuple[str, bool] | None) -> None:
    assert parse_disk_error(line) == found


def test_a_console_is_read_in_whatever_pieces_it_comes() -> None:
    told: list[tuple[str, bool]] = []
    watch = ConsoleWatch()
    watch.hear(WRITE + b"\n")  # nobody listens yet
    watch.told = lambda name, writing: told.append((name, writing))
    for at in range(0, len(WRITE), 7):
        watch.hear(WRITE[at : at + 7])
    assert told == []
    watch.hear(b"\r\nother\n" + b"x" * 100_000)
    watch.hear(b"\n" + WRITE.replace(b"vda", b"vdb") + b"\n")
    assert told == [("vda", True), ("vdb", True)]


def test_of_an_error_the_disk_that_is_full_is_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Disk("root", Path("/layers/root"), 16, base=Path("/images/base"))
    data, image = Disk("data", Path("/full/data"), 17), Disk("image", Path("/full/image"), 18, read_only=True)
    device = Disk("dev", Path("/dev/sdx"), 19, host_device=True)
    disks = [(name_of(number), disk) for number, disk in enumerate((root, data, image, device))]
    monkeypatch.setattr(disk_errors, "_is_full", lambda path: path.parts[1] == "full")
    full = DiskError("data", writing=True, full=True, stopped=True)
    assert [disk_error_of(name, True, disks) for name in ("vda", "vdb", "vdx")] == [full] * 3
    assert disk_error_of("vdb", False, disks) == DiskError("data", writing=False, full=False, stopped=False)
    monkeypatch.setattr(disk_errors, "_is_full", lambda path: False)
    assert disk_error_of("vda", True, disks) == DiskError("root", writing=True, full=False, stopped=True)
    assert disk_error_of("vdd", True, disks) == DiskError("dev", writing=True, full=False, stopped=False)
    assert disk_error_of("vdx", True, disks) is None


def test_whether_a_file_system_is_full(tmp_path: Path) -> None:
    assert not disk_errors._is_full(tmp_path)
    assert not disk_errors._is_full(tmp_path / "gone")
    assert os.statvfs("/proc").f_bavail == 0
    assert disk_errors._is_full(Path("/proc"))
