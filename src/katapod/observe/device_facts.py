"""The devices of a VM as they are on record, beside what the VMM says. Pure."""

from msgspec.structs import replace

from katapod.model.devices import DeviceTable
from katapod.model.inspection import Hypervisor, Missing, RecordedDevice

__all__ = ["compared", "recorded_devices"]


def recorded_devices(table: DeviceTable) -> tuple[RecordedDevice, ...]:
    """In the order of their slots; memory comes last."""
    found = []
    if (share := table.share) is not None:
        found.append(
            RecordedDevice(
                kind="share", name=share.tag, slot=share.slot, host=share.socket, guest_path=share.guest_path
            )
        )
    found += [
        RecordedDevice(
            kind="disk",
            name=disk.disk_id,
            slot=disk.slot,
            host=disk.path,
            backing=disk.base,
            read_only=disk.read_only,
            guest_path=disk.guest_path,
        )
        for disk in table.disks
    ]
    found += [
        RecordedDevice(kind="nic", name=nic.interface, slot=nic.slot, host=nic.tap, guest_path=nic.guest_path)
        for nic in table.nics
    ]
    found.sort(key=lambda device: device.slot or 0)
    dimms = [RecordedDevice(kind="memory", name=str(dimm.number), size_mib=dimm.size_mib) for dimm in table.dimms]
    return (*found, *dimms)


def compared(
    devices: tuple[RecordedDevice, ...], hypervisor: Hypervisor | None
) -> tuple[tuple[RecordedDevice, ...], list[Missing]]:
    """With whether the VMM has each of them, and what it has that is not on record. A device is known by its place in
    the guest, memory by what there is in all. Not every VMM tells of devices."""
    if hypervisor is None or not hypervisor.devices:
        return devices, []
    places = {device.guest_path for device in hypervisor.devices if device.guest_path}
    left_mib = hypervisor.plugged_memory >> 20
    seen = []
    for device in devices:
        if device.kind == "memory":
            left_mib -= device.size_mib
            seen.append(replace(device, in_vmm=left_mib >= 0))
        else:
            seen.append(replace(device, in_vmm=device.guest_path in places))
    missing = []
    known = {device.guest_path for device in devices}
    for one in hypervisor.devices:
        if one.origin == "hot-plug" and one.guest_path and one.guest_path not in known:
            missing.append(
                Missing("devices", f"the VMM has {one.device_id} at {one.guest_path}, which is not on record")
            )
    if left_mib > 0:
        missing.append(Missing("devices", f"the VMM has {left_mib} MiB of plugged memory that are not on record"))
    return tuple(seen), missing
