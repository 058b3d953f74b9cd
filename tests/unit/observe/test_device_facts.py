"""Devices on record, beside what a VMM says."""

from katapod.model import inspection as facts
from katapod.model.devices import DeviceTable, DimmEntry, DiskEntry, NicEntry, ShareEntry
from katapod.observe.device_facts import compared, recorded_devices

TABLE = DeviceTable(
    share=ShareEntry("kataShared", 1, "/s.sock", guest_path="02/01"),
    nics=(NicEntry(0, 31, "eth0", "tap0_kata", "02:00:00:00:00:01", 1500, guest_path="02/1f"),),
    disks=(DiskEntry("root-1", 2, "/l.qcow2", base="/base", guest_path="02/02"), DiskEntry("d1", 3, "/dev/sdx")),
    dimms=(DimmEntry(0, 128), DimmEntry(1, 256)),
)


def said(*places: str, plugged_mib: int = 384) -> facts.Hypervisor:
    devices = [facts.Device(device_id=f"at {place}", guest_path=place, origin="hot-plug") for place in places]
    devices += [facts.Device(device_id="rng", guest_path="04", origin="command line"), facts.Device(device_id="dimm0")]
    return facts.Hypervisor(devices=tuple(devices), plugged_memory=plugged_mib << 20)


def test_the_table_by_slots() -> None:
    found = recorded_devices(TABLE)
    assert [(one.kind, one.name, one.slot) for one in found] == [
        ("share", "kataShared", 1),
        ("disk", "root-1", 2),
        ("disk", "d1", 3),
        ("nic", "eth0", 31),
        ("memory", "0", None),
        ("memory", "1", None),
    ]
    assert (found[1].host, found[1].backing, found[3].host, found[5].size_mib) == (
        "/l.qcow2",
        "/base",
        "tap0_kata",
        256,
    )
    assert recorded_devices(DeviceTable()) == ()


def test_what_the_vmm_has_and_lacks() -> None:
    devices = recorded_devices(TABLE)
    found, missing = compared(devices, said("02/01", "02/02", "02/1f"))
    assert [one.in_vmm for one in found] == [True, True, False, True, True, True]
    assert missing == []
    found, missing = compared(devices, said("02/01", "02/05", plugged_mib=128))
    assert [one.in_vmm for one in found] == [True, False, False, False, True, False]
    assert [one.why for one in missing] == ["the VMM has at 02/05 at 02/05, which is not on record"]
    found, missing = compared(devices, said("02/01", "02/02", "02/1f", plugged_mib=512))
    assert [one.why for one in missing] == ["the VMM has 128 MiB of plugged memory that are not on record"]


def test_a_vmm_that_does_not_say() -> None:
    devices = recorded_devices(TABLE)
    assert compared(devices, None) == (devices, [])
    assert compared(devices, facts.Hypervisor(version="6.1")) == (devices, [])
    assert {one.in_vmm for one in devices} == {None}
