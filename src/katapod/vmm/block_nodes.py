"""Disks as nodes of QEMU's block layer: values for blockdev-add, and for --blockdev of qemu-storage-daemon.

Source: QEMU's QMP reference manual, BlockdevOptions.
"""

from pathlib import Path
from typing import Any

from katapod.vmm.devices import Disk, DiskSettings

__all__ = ["disk_node_options"]


def disk_node_options(disk: Disk) -> dict[str, Any]:
    """All but the name of its node."""
    return _overlay(disk.path, disk.base) if disk.base is not None else _raw(disk)


def _raw(disk: Disk) -> dict[str, Any]:
    driver = "host_device" if disk.host_device else "file"
    cache = _cache(disk.settings)
    file = {
        "driver": driver,
        "filename": str(disk.path),
        "aio": disk.settings.aio,
        "node-name": f"file-{disk.disk_id}",
        **cache,
    }
    return {"driver": "raw", "read-only": disk.read_only, "file": file, **cache}


def _overlay(overlay: Path, base: Path) -> dict[str, Any]:
    """The raw file `base`, never written to, under a qcow2 `overlay`. What the guest wants to be flushed is written to
    the file, and stays in the host's page cache: it survives the death of the VM, and not a crash of the host."""
    unflushed = {"no-flush": True}
    return {
        "driver": "qcow2",
        "read-only": False,
        "discard": "unmap",
        "cache": unflushed,
        "file": {"driver": "file", "filename": str(overlay), "discard": "unmap", "cache": unflushed},
        "backing": {"driver": "raw", "read-only": True, "file": {"driver": "file", "filename": str(base)}},
    }


def _cache(settings: DiskSettings) -> dict[str, Any]:
    # QEMU's native AIO works with O_DIRECT only
    if not settings.cache_set:
        return {"cache": {"direct": True}} if settings.aio == "native" else {}
    return {"cache": {"direct": settings.direct or settings.aio == "native", "no-flush": settings.no_flush}}
