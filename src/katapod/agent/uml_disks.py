"""Disks of User-mode Linux that come and go, and its shared directory: "virtio-uml.3", a place that the kernel's
command line has named.

The kernel tries each place once, at its boot, and finds nobody behind most of them. When a device is there its driver
is bound again, by sysfs; before a disk is taken out the driver is unbound. Source: the kernel's
arch/um/drivers/virtio_uml.c, Documentation/driver-api/driver-model/binding.rst.
"""

from __future__ import annotations

import errno
import os

__all__ = ["bind_disk", "bind_place", "is_uml_place", "unbind"]

PREFIX = "virtio-uml."
DRIVER = "/sys/bus/platform/drivers/virtio-uml"
DEVICES = "/sys/bus/platform/devices"


def is_uml_place(source: str) -> bool:
    number = source.removeprefix(PREFIX)
    return number != source and number.isascii() and number.isdigit() and len(number) <= 3


def bind_place(place: str) -> bool:
    """Bind the driver of a place, if it is not bound; returns whether there is a device.

    The write returns once the driver has set the device up. Raises OSError for a place that the kernel does not have.
    """
    if os.path.isdir(f"{DRIVER}/{place}"):
        return True
    try:
        _write(f"{DRIVER}/bind", place)
    except OSError as exc:
        if exc.errno in (errno.ENOENT, errno.ECONNREFUSED):
            return False  # nobody listens there yet
        raise
    return True


def bind_disk(place: str) -> str:
    """The name of the disk at a place, whose driver is bound if it is not; empty if it is not there yet. Raises as
    bind_place."""
    if not bind_place(place):
        return ""
    directory = f"{DEVICES}/{place}"
    try:
        for entry in os.listdir(directory):
            if entry.startswith("virtio") and os.path.isdir(f"{directory}/{entry}/block"):
                return os.listdir(f"{directory}/{entry}/block")[0]
    except (OSError, IndexError):
        pass  # its driver has not finished
    return ""


def unbind(place: str) -> None:
    """Returns once the driver has let go. Raises OSError."""
    if os.path.isdir(f"{DRIVER}/{place}"):
        _write(f"{DRIVER}/unbind", place)


def _write(path: str, text: str) -> None:
    with open(path, "w") as handle:
        handle.write(text)
