"""Plugged memory: the guest's answer about it."""

import asyncio

from katapod.vmm.errors import VmmRefused

__all__ = ["until_plugged"]

GROW_LIMIT_S = 20.0


async def until_plugged(plugged: "asyncio.Future[str]", more_mib: int) -> None:
    """`plugged` is of VirtualMachine.expect_memory. Raises VmmRefused if the guest does not take the memory."""
    if more_mib <= 0:
        return
    try:
        async with asyncio.timeout(GROW_LIMIT_S):
            refusal = await plugged
    except TimeoutError as exc:
        raise VmmRefused(f"cannot plug {more_mib} MiB: the guest did not answer within {GROW_LIMIT_S:g} s") from exc
    if refusal:
        raise VmmRefused(f"cannot plug {more_mib} MiB: the guest refused with {refusal}")
