"""Devices as values: what QEMU makes of them, and the table that a sandbox has of its own."""

from pathlib import Path

from msgspec.structs import replace

from katapod.model.devices import DeviceTable, DimmEntry, DiskEntry, NicEntry, ShareEntry
from katapod.vmm.devices import Device, Disk, Memory, Nic, SharedDirectory
from katapod.vmm.processes import is_vm
from katapod.vmm.qemu.command_line import QemuOptions
from katapod.vmm.qemu.hotplug import (
    plan_device,
    plan_disk,
    plan_memory,
    plan_nic_device,
    plan_shared_directory,
)
from katapod.vmm.qemu.vmm import Qemu
from katapod.vmm.spec import Accelerator, VmSpec

SPEC = VmSpec("s1", "u", "/q", Path("/k"), Path("/i"), Accelerator.TCG, 256, 512, 1, 1, Path("/vm"))


def test_each_device_has_its_hot_plug_plan() -> None:
    path = Path("/d")
    overlay = Disk("d", path, 2, base=Path("/b"))
    plans: list[tuple[Device, object]] = [
        (SharedDirectory("t", path, 1, queue_size=64), plan_shared_directory("t", 1, queue_size=64)),
        (overlay, plan_disk(overlay)),
        (
            Nic(1, "02:00:00:00:00:02", 31, queues=(7, 8)),
            plan_nic_device(1, "02:00:00:00:00:02", 31, queues=2, vhost=False),
        ),
        (
            Nic(1, "02:00:00:00:00:02", 31, queues=(7,), vhost=(9,)),
            plan_nic_device(1, "02:00:00:00:00:02", 31, queues=1, vhost=True),
        ),
        (Memory(3, 256, hugepages=True), plan_memory(3, 256, hugepages=True)),
    ]
    for device, plan in plans:
        assert plan_device(device) == plan


def test_a_nic_is_detached_without_its_descriptors() -> None:
    assert (
        plan_device(Nic(1, "02:00:00:00:00:02", 31)).undo
        == plan_device(Nic(1, "02:00:00:00:00:02", 31, queues=(7,))).undo
    )


def test_disks_and_nics_come_from_the_two_ends_of_a_bridge() -> None:
    can = Qemu().capabilities(SPEC)
    assert (can.share_slot, can.disk_slots[:2], can.disk_slots[-1]) == (1, (2, 3), 31)
    assert can.nic_slots == (31, 30, 29, 28, 27, 26, 25, 24)
    more = Qemu().capabilities(replace(SPEC, options=QemuOptions(bridges=2)))
    assert (more.disk_slots[21:23], more.disk_slots[-1]) == ((23, 32 + 1), 31)


def test_the_table() -> None:
    table = DeviceTable().with_share(ShareEntry("t", 1, "/s"))
    table = (
        table.with_disk(DiskEntry("a", 2, "/a"))
        .with_disk(DiskEntry("b", 3, "/b"))
        .with_nic(NicEntry(0, 31, "e", "t", "m", 1500))
    )
    assert table.slots == {1, 2, 3, 31}
    assert table.free_slot((1, 2, 3, 4)) == 4
    assert table.free_slot((31, 30)) == 30
    assert table.free_slot((31, 3)) is None
    assert table.with_disk(DiskEntry("a", 2, "/a", guest_path="02/02")).disk("a") == DiskEntry(
        "a", 2, "/a", guest_path="02/02"
    )
    assert table.without_disk("a").free_slot((2, 4)) == 2
    assert (table.disk("c"), table.nic(1), table.without_nic(0).nics) == (None, None, ())
    table = table.with_dimm(DimmEntry(0, 128)).with_dimm(DimmEntry(1, 256))
    assert table.plugged_mib == 384
    assert table.without_dimm(1).dimms == (DimmEntry(0, 128),)


def test_a_vm_is_known_by_its_directory() -> None:
    command = "/usr/bin/qemu-system-x86_64\0-pidfile\0/run/vc/vm/s1/pid\0"
    assert is_vm(command, Path("/run/vc/vm/s1"))
    assert not is_vm(command, Path("/run/vc/vm/s2"))
    assert not is_vm("/usr/bin/less\0/run/vc/vm/s1/pid\0", Path("/run/vc/vm/s1"))
