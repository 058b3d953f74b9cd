"""Disks of a real kernel of User-mode Linux, each served by a qemu-storage-daemon in its jail."""

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tiny_guest_helper import TinyGuest, tiny_guest
from uml_helper import processes_of

from katapod.vmm.devices import Disk
from katapod.vmm.errors import VmmRefused
from katapod.vmm.uml import machine_disks
from katapod.vmm.uml.disk_server import STORAGE_DAEMON, has_disk_server
from katapod.vmm.uml.disks import FIRST_SLOT, disk_options
from katapod.vmm.uml.machine_disks import MachineDisks
from kit.uids import UML_DISKS_UID as UID
from kit.uml_guest import needs_uml

pytestmark = [
    *needs_uml,
    pytest.mark.skipif(not has_disk_server(), reason="needs the package qemu-utils"),
]

BLK = ("drivers/block/virtio_blk.ko",)

SIZE = 256 << 20
SMALL = 8 << 20
DRIVER = "/sys/bus/platform/drivers/virtio-uml"
MOUNT = "mount -t ext4 -o discard,nobarrier,data=writeback /dev/vda /mnt || echo FAILED\n"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """An image's disk: root's, as in the store."""
    files = tmp_path / "files"
    files.mkdir()
    (files / "hello").write_text("from the image\n")
    disk = tmp_path / "base.ext4"
    with disk.open("wb") as file:
        file.truncate(SIZE)
    disk.chmod(0o600)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", files, disk], check=True)
    return disk


@asynccontextmanager
async def guest_with(
    disks: Sequence[Disk], script: str, tmp_path: Path
) -> AsyncIterator[tuple[TinyGuest, MachineDisks]]:
    """A guest that finds `disks` as it boots. Its first place is virtio-uml.0: no other device comes before."""
    directory = Path(tempfile.mkdtemp(prefix="kt-uml-", dir="/dev/shm"))  # pytest's own are root's alone
    directory.chmod(0o711)
    sockets = directory / "sockets"
    machine = MachineDisks(sockets, directory, UID, lambda: tmp_path / "disks.log")
    try:
        for disk in disks:
            machine.add(disk)
        await machine.serve()
        with tiny_guest(script, disk_options(sockets), modules=BLK, uid=UID) as guest:
            yield guest, machine
        await machine.close()
        assert not sockets.exists() or os.listdir(sockets) == []
    finally:
        await machine.close()
        shutil.rmtree(directory)


async def test_an_overlay_takes_what_is_written_and_gives_back_what_is_discarded(base: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "root.qcow2"
    before = base.read_bytes()
    script = f"""{MOUNT}
echo HELLO $(cat /mnt/hello)
dd if=/dev/urandom of=/mnt/big bs=1M count=32 conv=fsync 2> /dev/null
echo SUM $(md5sum < /mnt/big)
echo 3 > /proc/sys/vm/drop_caches
echo AGAIN $(md5sum < /mnt/big); read line
rm /mnt/big; sync; fstrim /mnt && echo TRIMMED; read line
"""
    async with guest_with([Disk("root", overlay, FIRST_SLOT, base=base)], script, tmp_path) as (guest, _):
        assert guest.wait_for("HELLO ") == "from the image"
        assert guest.wait_for("SUM ") == guest.wait_for("AGAIN ")
        full = overlay.stat().st_blocks * 512
        assert full > 32 << 20
        guest.say("go on")
        guest.wait_for("TRIMMED")
        assert overlay.stat().st_blocks * 512 < full - (16 << 20)
    assert base.read_bytes() == before


async def test_several_disks_in_order_one_of_them_read_only(base: Path, tmp_path: Path) -> None:
    overlay, data = tmp_path / "root.qcow2", tmp_path / "data"
    data.write_bytes(bytes(8 << 20))
    script = """
echo SIZES $(cat /sys/block/vda/size /sys/block/vdb/size /sys/block/vdc/size)
echo RO $(cat /sys/block/vda/ro /sys/block/vdb/ro /sys/block/vdc/ro) CACHE $(cat /sys/block/vdb/queue/write_cache)
dd if=/dev/zero of=/dev/vdc bs=4k count=1 conv=fsync 2> /dev/null || echo REFUSED
printf katapod | dd of=/dev/vdb bs=4k seek=3 conv=fsync 2> /dev/null && echo WRITTEN; read line
"""
    disks = [
        Disk("root", overlay, FIRST_SLOT, base=base),
        Disk("data", data, FIRST_SLOT + 1),
        Disk("image", base, FIRST_SLOT + 2, read_only=True),
    ]
    async with guest_with(disks, script, tmp_path) as (guest, _):
        assert guest.wait_for("SIZES ") == f"{SIZE // 512} {(8 << 20) // 512} {SIZE // 512}"
        assert guest.wait_for("RO ") == "0 0 1 CACHE write through"
        guest.wait_for("REFUSED")
        guest.wait_for("WRITTEN")
    assert data.read_bytes()[3 * 4096 :][:7] == b"katapod"


async def test_disks_come_and_go_and_grow_while_the_guest_runs(base: Path, tmp_path: Path) -> None:
    script = f"""
echo UP $(ls /sys/block); read line
echo virtio-uml.3 > {DRIVER}/bind; echo HAS $(cat /sys/block/vda/size /sys/block/vda/ro); read line
while [ "$(cat /sys/block/vda/size)" != {2 * SMALL // 512} ]; do usleep 10000; done
printf katapod | dd of=/dev/vda bs=4k seek={SMALL // 4096 + 1} conv=fsync 2> /dev/null && echo GROWN; read line
echo virtio-uml.3 > {DRIVER}/unbind; echo GONE $(ls /sys/block); read line
echo virtio-uml.3 > {DRIVER}/bind; echo HAS $(cat /sys/block/vda/size /sys/block/vda/ro)
mount -t ext4 -o ro /dev/vda /mnt; cat /mnt/hello; read line
"""
    data = tmp_path / "data"
    data.write_bytes(bytes(SMALL))
    late = Disk("data", data, FIRST_SLOT + 3)
    async with guest_with([], script, tmp_path) as (guest, machine):
        assert guest.wait_for("UP") == ""
        assert await machine.plug(late) == "virtio-uml.5", "two devices are before them in a sandbox"
        with pytest.raises(VmmRefused, match="it does not use the disk"):
            await machine.resize("data", SMALL)
        guest.say("go on")
        assert await asyncio.to_thread(guest.wait_for, "HAS ") == f"{SMALL // 512} 0"
        os.truncate(data, 2 * SMALL)
        await machine.resize("data", 2 * SMALL)
        guest.say("go on")
        await asyncio.to_thread(guest.wait_for, "GROWN")
        assert data.read_bytes()[SMALL + 4096 :][:7] == b"katapod"
        guest.say("go on")
        assert await asyncio.to_thread(guest.wait_for, "GONE") == ""
        await machine.unplug("data")
        await machine.unplug("data")  # what is out already is no error
        assert machine.disks == []
        await machine.plug(Disk("image", base, FIRST_SLOT + 3, read_only=True))
        guest.say("go on")
        assert await asyncio.to_thread(guest.wait_for, "HAS ") == f"{SIZE // 512} 1"
        await asyncio.to_thread(guest.wait_for, "from the image")


async def test_a_guest_that_does_not_let_go_keeps_its_disk(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_disks, "LET_GO_S", 0.2)
    script = f"""
read line; echo virtio-uml.0 > {DRIVER}/bind; echo BOUND; read line
dd if=/dev/vda of=/dev/null count=8 2> /dev/null && echo READ; read line
echo virtio-uml.0 > {DRIVER}/unbind; echo GONE; read line
"""
    async with guest_with([], script, tmp_path) as (guest, machine):
        await machine.plug(Disk("image", base, FIRST_SLOT, read_only=True))
        guest.say("go on")
        await asyncio.to_thread(guest.wait_for, "BOUND")
        with pytest.raises(VmmRefused, match="cannot detach disk image: the guest does not let go of it"):
            await machine.unplug("image")
        guest.say("go on")
        await asyncio.to_thread(guest.wait_for, "READ")
        guest.say("go on")
        await asyncio.to_thread(guest.wait_for, "GONE")
        await machine.unplug("image")


async def test_a_file_that_is_no_disk_is_refused_and_the_guest_goes_on(tmp_path: Path) -> None:
    directory = tmp_path / "directory"
    directory.mkdir()
    async with guest_with([], "echo UP; read line; echo ALIVE; read line\n", tmp_path) as (guest, machine):
        guest.wait_for("UP")
        with pytest.raises(VmmRefused, match="cannot attach disk bad: qemu-storage-daemon ended unexpectedly"):
            await machine.plug(Disk("bad", directory, FIRST_SLOT))
        assert (machine.disks, machine.lost.done()) == ([], False)
        guest.say("go on")
        guest.wait_for("ALIVE")


async def test_the_daemon_is_in_a_jail_and_its_end_is_told(base: Path, tmp_path: Path) -> None:
    disk = Disk("image", base, FIRST_SLOT, read_only=True)
    async with guest_with([disk], "echo UP; read line\n", tmp_path) as (guest, machine):
        guest.wait_for("UP")
        (pid,) = [
            pid for pid in processes_of(UID) if Path(f"/proc/{pid}/cmdline").read_text().startswith(STORAGE_DAEMON)
        ]
        status = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
        )
        assert status["Uid"].split() == [str(UID)] * 4
        assert (int(status["CapEff"], 16), int(status["CapBnd"], 16), status["NoNewPrivs"]) == (2, 2, "1")
        assert status["Seccomp"] == "2"
        assert sorted(os.listdir(f"/proc/{pid}/root/disks")) == ["disk"]
        assert (tmp_path / "disks.log").read_text() == ""  # else its end would be told with words of its start
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(180):
            server = await machine.lost
        assert str(server.explain_end()).startswith(f"{STORAGE_DAEMON} ended unexpectedly: killed by SIGKILL")


async def test_a_disk_that_cannot_be_opened_at_the_boot_is_told(tmp_path: Path) -> None:
    image = tmp_path / "base"
    image.write_bytes(bytes(1 << 20))
    machine = MachineDisks(tmp_path / "sockets", tmp_path, UID, lambda: tmp_path / "disks.log")
    overlay = tmp_path / "root.qcow2"
    machine.add(Disk("root", overlay, FIRST_SLOT, base=image))
    overlay.write_bytes(b"no qcow2")
    await machine.serve()
    async with asyncio.timeout(180):
        server = await machine.lost
    await machine.close()
    assert "not in qcow2 format" in str(server.explain_end())
