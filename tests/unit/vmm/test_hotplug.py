"""Hot-plug plans: the commands, and that each half-done plan has its way back."""

from pathlib import Path

import pytest

from katapod.vmm.devices import Disk, DiskSettings, dimm_sizes
from katapod.vmm.qemu.hotplug import (
    FileToOpen,
    HotplugPlan,
    QmpStep,
    pci_path,
    plan_disk,
    plan_memory,
    plan_nic_device,
    plan_shared_directory,
    plan_vcpus,
)


def cpu(socket: int, *, plugged: bool = False) -> dict[str, object]:
    entry: dict[str, object] = {
        "props": {"core-id": 0, "thread-id": 0, "socket-id": socket},
        "vcpus-count": 1,
        "type": "max-x86_64-cpu",
    }
    return entry | ({"qom-path": f"/machine/unattached/device[{socket}]"} if plugged else {})


CPUS = [cpu(3), cpu(2), cpu(1), cpu(0, plugged=True)]

ALL = [
    plan_shared_directory("kataShared", 1),
    plan_disk(Disk("d1", Path("/dev/sdx"), 2, read_only=True)),
    plan_vcpus(CPUS, 2),
    plan_memory(0, 256),
    plan_disk(Disk("root-1", Path("/sandbox/root.qcow2"), 3, base=Path("/image/root.ext4"))),
]


def test_shared_directory() -> None:
    assert ALL[0].describe() == (
        "plug shared directory kataShared\n"
        "  chardev-add {'id': 'char-kataShared', 'backend': {'type': 'socket', 'data': "
        "{'addr': {'type': 'fd', 'data': {'str': 'share-kataShared'}}, 'server': False}}}\n"
        "  device_add {'driver': 'vhost-user-fs-pci', 'id': 'fs-kataShared', 'chardev': 'char-kataShared', "
        "'tag': 'kataShared', 'queue-size': 1024, 'bus': 'pci-bridge-0', 'addr': '0x1'}"
    )


def test_nic() -> None:
    plan = plan_nic_device(0, "02:00:00:00:00:02", 31, queues=1, vhost=False)
    assert plan.describe() == (
        "plug network interface 02:00:00:00:00:02\n"
        "  netdev_add {'type': 'tap', 'id': 'network-0', 'fds': 'tap0-0'}\n"
        "  device_add {'driver': 'virtio-net-pci', 'id': 'virtio-net-0', 'netdev': 'network-0', "
        "'mac': '02:00:00:00:00:02', 'disable-legacy': 'on', 'romfile': '', 'bus': 'pci-bridge-0', 'addr': '0x1f'}"
    )
    assert plan.guest_path == "02/1f"


def test_a_nic_with_a_queue_for_each_vcpu_and_vhost() -> None:
    plan = plan_nic_device(1, "02:00:00:00:00:02", 30, queues=2, vhost=True)
    backend, device = plan.steps
    assert backend.arguments["fds"] == "tap1-0:tap1-1"
    assert backend.arguments["vhost"] is True
    assert backend.arguments["vhostfds"] == "vhost1-0:vhost1-1"
    assert (device.arguments["mq"], device.arguments["vectors"]) == (True, 6)
    assert [step.command for step in plan.undo] == ["device_del", "netdev_del"]


def test_disk() -> None:
    assert ALL[1].describe() == (
        "plug disk /dev/sdx\n"
        "  add-fd {'fdset-id': 4, 'opaque': '/dev/sdx'}\n"
        "  blockdev-add {'driver': 'raw', 'node-name': 'drive-d1', 'read-only': True, 'file': "
        "{'driver': 'file', 'filename': '/dev/fdset/4', 'aio': 'threads', 'node-name': 'file-d1'}}\n"
        "  device_add {'driver': 'virtio-blk-pci', 'id': 'virtio-d1', 'drive': 'drive-d1', "
        "'share-rw': True, 'werror': 'enospc', 'rerror': 'report', 'bus': 'pci-bridge-0', 'addr': '0x2'}"
    )
    assert ALL[1].guest_path == "02/02"


def test_layered_disk() -> None:
    """Nobody writes to the base, a flush costs nothing, and what cannot be written stops the VM."""
    own, base, added, device = (step.arguments for step in ALL[4].steps)
    assert (own["opaque"], base["opaque"]) == ("/sandbox/root.qcow2", "/image/root.ext4")
    assert [step.file for step in ALL[4].steps[:2]] == [
        FileToOpen(Path("/sandbox/root.qcow2"), read_only=False),
        FileToOpen(Path("/image/root.ext4"), read_only=True),
    ]
    assert (added["driver"], added["node-name"], added["read-only"]) == ("qcow2", "drive-root-1", False)
    assert added["file"]["filename"] == f"/dev/fdset/{own['fdset-id']}"
    assert added["cache"] == added["file"]["cache"] == {"no-flush": True}
    assert added["backing"] == {
        "driver": "raw",
        "read-only": True,
        "file": {"driver": "file", "filename": f"/dev/fdset/{base['fdset-id']}"},
    }
    assert (device["werror"], device["rerror"], device["addr"]) == ("stop", "report", "0x3")


def test_a_disk_past_the_cache_is_opened_so() -> None:
    """QEMU looks in a set for a descriptor with the flags that it wants."""
    native, set_so = DiskSettings(aio="native"), DiskSettings(cache_set=True, direct=True)
    cached = DiskSettings(cache_set=True, direct=False)
    for settings, direct in ((native, True), (set_so, True), (cached, False), (DiskSettings(), False)):
        step = plan_disk(Disk("d", Path("/d"), 1, settings=settings)).steps[0]
        assert step.file == FileToOpen(Path("/d"), read_only=False, direct=direct)


def test_no_two_disks_have_the_same_set_of_descriptors() -> None:
    disks = [Disk(f"d{slot}", Path("/d"), slot, base=Path("/b")) for slot in (1, 2, 31, 33)]
    sets = [step.arguments["fdset-id"] for disk in disks for step in plan_disk(disk).steps if step.file is not None]
    assert len(set(sets)) == len(sets) == 8


def test_vcpus_are_the_lowest_free_ones() -> None:
    assert [step.arguments["id"] for step in ALL[2].steps] == ["cpu-0-1-0", "cpu-0-2-0"]
    assert [step.arguments["socket-id"] for step in ALL[2].steps] == [1, 2]


def test_memory() -> None:
    assert ALL[3].describe() == (
        "plug 256 MiB of memory\n"
        "  object-add {'qom-type': 'memory-backend-memfd', 'id': 'mem0', 'size': 268435456, 'share': True}\n"
        "  device_add {'driver': 'pc-dimm', 'id': 'dimmmem0', 'memdev': 'mem0'}"
    )


REMOVED_BY = {
    "chardev-add": ("chardev-remove", "id"),
    "device_add": ("device_del", "id"),
    "blockdev-add": ("blockdev-del", "node-name"),
    "object-add": ("object-del", "id"),
    "add-fd": ("remove-fd", "fdset-id"),
}


@pytest.mark.parametrize("plan", ALL, ids=lambda plan: plan.what)
def test_every_step_has_its_inverse_in_reverse_order(plan: HotplugPlan) -> None:
    inverse = []
    for step in reversed(plan.steps):
        command, key = REMOVED_BY[step.command]
        inverse.append(QmpStep(command, {key: step.arguments[key]}))
    assert plan.undo == tuple(inverse)


def test_cpus_and_memory_stay_until_the_end() -> None:
    assert [plan.removable for plan in ALL] == [True, True, False, False, True]


@pytest.mark.parametrize("slot", [0, 32, 64])
def test_slots_the_bridge_does_not_have(slot: int) -> None:
    with pytest.raises(ValueError, match="1 to 31 do"):
        plan_disk(Disk("d", Path("/d"), slot))


def test_ids_that_qemu_would_cut() -> None:
    """Node names have 31 characters at most: two long ids must not become one."""
    plan_disk(Disk("d" * 25, Path("/d"), 1))
    with pytest.raises(ValueError, match="more than 25 characters"):
        plan_disk(Disk("d" * 26, Path("/d"), 1))


def test_slot_31() -> None:
    assert pci_path(31) == "02/1f"


def test_more_vcpus_than_there_are() -> None:
    with pytest.raises(ValueError, match="cannot add 4 vCPUs: the machine has room for 3 more"):
        plan_vcpus(CPUS, 4)


@pytest.mark.parametrize("size", [0, -128, 100])
def test_memory_comes_in_blocks(size: int) -> None:
    with pytest.raises(ValueError, match="multiple of 128"):
        plan_memory(0, size)


@pytest.mark.parametrize(
    ("present", "more", "sizes"),
    [
        (256, 0, ()),
        (256, 1792, (1792,)),
        (256, 2048, (2048,)),
        (256, 24064 - 256, (2048, 18432, 3328)),
        (2048, 16384, (16384,)),
        (100, 768, (768,)),
    ],
)
def test_a_small_guest_takes_much_memory_in_steps(present: int, more: int, sizes: tuple[int, ...]) -> None:
    """Its kernel pays for the page structures of a DIMM with what it has already."""
    assert dimm_sizes(present, more) == sizes


def test_a_terabyte_takes_few_of_the_ten_slots() -> None:
    assert len(dimm_sizes(256, 1 << 20)) == 4
