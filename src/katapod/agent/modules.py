"""Kernel modules that must be loaded explicitly. The kernel loads most others on demand, when a container with
sufficient rights needs them."""

from __future__ import annotations

import os

from katapod.agent import log, program
from katapod.rpc.status import RpcError, StatusCode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from katapod.agent.loop import Loop

__all__ = ["load_module", "load_packet_filters"]

MODPROBE_LIMIT_S = 30.0
LOADED = "/sys/module"
PACKET_FILTERS = ("ip_tables", "ip6_tables", "ebtables", "arp_tables")


async def load_module(loop: Loop, name: str, parameters: list[str]) -> None:
    """Raises RpcError (INVALID_ARGUMENT, INTERNAL)."""
    if not name or name.startswith("-"):
        raise RpcError(StatusCode.INVALID_ARGUMENT, f"cannot load the kernel module {name[:64]!r}: invalid name")
    try:
        await program.run(loop, ["modprobe", "--", name, *parameters], MODPROBE_LIMIT_S)
    except program.ProgramError as exc:
        raise RpcError(StatusCode.INTERNAL, f"cannot load the kernel module {name}: {exc}") from exc


async def load_packet_filters(loop: Loop) -> None:
    """For containers that may change packet filters. The legacy tools (iptables-legacy, ebtables-legacy) begin with a
    socket option for which the kernel loads no module; they call modprobe, for which a container has no modules."""
    missing = [name for name in PACKET_FILTERS if not os.path.isdir(f"{LOADED}/{name}")]
    if not missing:
        return
    try:
        await program.run(loop, ["modprobe", "-a", *missing], MODPROBE_LIMIT_S)
    except program.ProgramError as exc:
        log.debug(f"cannot load {' '.join(missing)}: {exc}")  # the kernel or the image lacks them
