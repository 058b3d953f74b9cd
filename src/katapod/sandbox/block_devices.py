"""Block devices of the host that a container is given, such as a pod's block volumes: disks of the VM."""

import hashlib
import os
import stat
from pathlib import Path

from katapod.model import oci
from katapod.model.errors import NotFound, SpecError
from katapod.rpc.pb import agent_pb2
from katapod.sandbox.lifecycle import Sandbox

__all__ = ["close_block_devices", "has_block_devices", "open_block_devices"]

BLOCK_DEVICES_MAX = 16  # of a container; one with more was given all that the host has
SYS_BLOCK = Path("/sys/dev/block")


def has_block_devices(spec: oci.Spec) -> bool:
    return bool(_block_devices(spec))


async def open_block_devices(sandbox: Sandbox, container_id: str, spec: oci.Spec) -> tuple[agent_pb2.Device, ...]:
    """Plug the container's block devices; returns what the agent has to know of them. What fails half-way is undone by
    close_block_devices. Raises SpecError, NotFound, VmmRefused, KatapodError."""
    wanted = _block_devices(spec)
    if len(wanted) > BLOCK_DEVICES_MAX:
        raise SpecError(
            f"cannot give {container_id} {len(wanted)} block devices: at most {BLOCK_DEVICES_MAX} are allowed",
            hint="for privileged containers set privileged_without_host_devices = true in the engine's configuration",
        )
    found = []
    for device in wanted:
        path = _node_of(device)
        pci_path = await sandbox.add_disk(
            _disk_id(container_id, device), path, read_only=not _may_write(spec, device), host_device=True
        )
        found.append(agent_pb2.Device(id=pci_path, type="blk", container_path=device.path))
    return tuple(found)


async def close_block_devices(sandbox: Sandbox, container_id: str, spec: oci.Spec) -> None:
    """Take out those that are plugged. Raises VmmRefused."""
    for device in _block_devices(spec):
        disk_id = _disk_id(container_id, device)
        if sandbox.disk_path(disk_id):
            await sandbox.remove_disk(disk_id)


def _block_devices(spec: oci.Spec) -> tuple[oci.Device, ...]:
    return tuple(device for device in spec.linux.devices if device.type == "b")


def _disk_id(container_id: str, device: oci.Device) -> str:
    return f"vol-{hashlib.sha256(f'{container_id}:{device.path}'.encode()).hexdigest()[:16]}"


def _node_of(device: oci.Device) -> Path:
    """The host's node of the device, whose own path says where the container has it. Raises NotFound."""
    numbers = f"{device.major}:{device.minor}"
    try:
        lines = (SYS_BLOCK / numbers / "uevent").read_text().splitlines()
        name = next(line.partition("=")[2] for line in lines if line.startswith("DEVNAME="))
        path = Path("/dev") / name
        status = os.stat(path)
    except (OSError, StopIteration) as exc:
        raise NotFound(f"cannot find the block device {numbers} for {device.path}: this host has none") from exc
    if not stat.S_ISBLK(status.st_mode) or status.st_rdev != os.makedev(device.major, device.minor):
        raise NotFound(f"cannot use {path} for {device.path}: it is not the block device {numbers}")
    return path


def _may_write(spec: oci.Spec, device: oci.Device) -> bool:
    """By the rule that names the device; what engines write for read-only volumes has no `w`."""
    rules = spec.linux.resources.devices if spec.linux.resources else ()
    for rule in rules:
        if rule.type == "b" and (rule.major, rule.minor) == (device.major, device.minor):
            return rule.allow and "w" in rule.access
    return True
