"""Memory that was plugged: the guest's word on it."""

import asyncio
from typing import Any

from katapod.vmm.errors import VmmRefused
from katapod.vmm.qemu.hotplug import dimm_id
from katapod.vmm.qemu.process import QemuProcess

__all__ = ["expect_grown", "until_grown"]

GROW_LIMIT_S = 20.0


def expect_grown(vm: QemuProcess, last: int) -> "asyncio.Future[Any]":
    """The guest's word on the last DIMM, or that it refuses one before."""

    def is_it(data: Any) -> bool:
        info = data["info"]
        return bool(info["slot-type"] == "DIMM" and (info["status"] != 0 or info.get("device") == dimm_id(last)))

    return vm.qmp.expect("ACPI_DEVICE_OST", is_it)


async def until_grown(grown: "asyncio.Future[Any]", more_mib: int) -> None:
    """Raises VmmRefused if the guest does not take the memory."""
    if more_mib <= 0:
        return
    try:
        async with asyncio.timeout(GROW_LIMIT_S):
            status = (await grown)["info"]["status"]
    except TimeoutError as exc:
        raise VmmRefused(f"cannot plug {more_mib} MiB: the guest did not answer within {GROW_LIMIT_S:g} s") from exc
    if status != 0:
        raise VmmRefused(f"cannot plug {more_mib} MiB: the guest refused with ACPI status {status:#x}")
