"""Devices of the host that a container of `run` is given: disks of the VM, or what the guest's kernel has as well."""

import os
import stat

from msgspec.structs import replace

from katapod.model import oci
from katapod.model.errors import NotFound, UsageError
from katapod.model.mount_flags import DeviceRequest
from katapod.plan.container_spec import ContainerOptions

__all__ = ["disks_among", "with_host_devices"]

OF_THE_GUEST = {
    "/dev/null": (1, 3),
    "/dev/zero": (1, 5),
    "/dev/full": (1, 7),
    "/dev/random": (1, 8),
    "/dev/urandom": (1, 9),
    "/dev/kmsg": (1, 11),
    "/dev/fuse": (10, 229),
    "/dev/net/tun": (10, 200),
    "/dev/loop-control": (10, 237),
}
"""Character devices that are the kernel's own, and so the guest's. Source: Documentation/admin-guide/devices.txt of
Linux."""


def disks_among(options: ContainerOptions) -> list[DeviceRequest]:
    """The requests that name block devices. Raises NotFound."""
    return [each for each in options.devices if stat.S_ISBLK(_status(each).st_mode)]


def with_host_devices(spec: oci.Spec, options: ContainerOptions) -> oci.Spec:
    """With the devices, and the rules that let the container open them. Raises NotFound, UsageError."""
    if not options.devices:
        return spec
    nodes = [_node(each) for each in options.devices]
    rules = tuple(
        oci.DeviceCgroup(allow=True, type=node.type, major=node.major, minor=node.minor, access=each.access)
        for node, each in zip(nodes, options.devices, strict=True)
    )
    resources = spec.linux.resources or oci.Resources()
    resources = replace(resources, devices=(*resources.devices, *rules))
    return replace(spec, linux=replace(spec.linux, devices=(*spec.linux.devices, *nodes), resources=resources))


def _status(request: DeviceRequest) -> os.stat_result:
    try:
        return os.stat(request.source)
    except OSError as exc:
        if request.source in OF_THE_GUEST:
            return os.stat("/dev/null")  # the guest has it, whatever this host has
        raise NotFound(f"cannot use --device {request.source}: {exc.strerror}") from exc


def _node(request: DeviceRequest) -> oci.Device:
    numbers = OF_THE_GUEST.get(request.source)
    if numbers is not None:
        return oci.Device(path=request.destination, type="c", major=numbers[0], minor=numbers[1], file_mode=0o666)
    status = _status(request)
    if not stat.S_ISBLK(status.st_mode):
        raise UsageError(
            f"cannot use --device {request.source}: a VM has a kernel of its own, and no character device of the host",
            hint=f"block devices can be given, and of the guest's own {', '.join(OF_THE_GUEST)}",
        )
    numbers = os.major(status.st_rdev), os.minor(status.st_rdev)
    return oci.Device(path=request.destination, type="b", major=numbers[0], minor=numbers[1])
