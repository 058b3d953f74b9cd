"""Block devices of the host in a container: disks of its VM, writable or not, and given back at its end."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.containerd import Containerd
from kit.kata import wait_for
from kit.oci_archive import BUSYBOX

pytestmark = pytest.mark.qemu("block devices")

SIZE = 8 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A loop device, and the file behind it."""
    backing = tmp_path / "volume"
    backing.write_bytes(b"from the host\n".ljust(SIZE, b"\0"))
    done = subprocess.run(["losetup", "--find", "--show", str(backing)], capture_output=True, text=True, check=True)
    device = done.stdout.strip()
    try:
        yield device, backing
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.reference
def test_a_block_device_is_read_and_written(ctr: Containerd, runtime: str, disk: tuple[str, Path]) -> None:
    device, backing = disk
    script = (
        f"head -n 1 {device}; blockdev --getsize64 {device}; echo from inside | dd of={device} seek=1 conv=fsync 2>&-"
    )
    result = ctr("run", "--rm", "--runtime", runtime, "--device", device, BUSYBOX, ctr.new_id(), "sh", "-c", script)
    assert (result.code, result.stdout) == (0, f"from the host\n{SIZE}\n"), result
    subprocess.run(["blockdev", "--flushbufs", device], check=True)
    assert backing.read_bytes()[512:524] == b"from inside\n"


def test_a_device_is_free_again_when_its_container_is_gone(
    ctr: Containerd, runtime: str, disk: tuple[str, Path]
) -> None:
    """QEMU lets go of it: nothing keeps the loop device from being detached, and it can be used once more."""
    device, backing = disk
    for _ in range(2):
        ctr.ok(
            "run", "--rm", "--runtime", runtime, "--device", device, BUSYBOX, ctr.new_id(), "head", "-n", "1", device
        )
    name = Path(device).name
    wait_for(lambda: not _holders(device), f"nobody holds {name}")
    assert backing.stat().st_size == SIZE


def _holders(device: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                found += [entry.name for fd in (entry / "fd").iterdir() if fd.resolve() == Path(device)]
    return found
