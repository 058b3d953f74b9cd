"""The call by which the guest lets go of a device of User-mode Linux, which cannot ask the kernel for it."""

from __future__ import annotations

from katapod.agent.network import parse_mac
from katapod.agent.uml_disks import is_uml_place, unbind
from katapod.kernel.netlink import IFF_LOOPBACK, IFF_UP, Netlink
from katapod.rpc.pb import katapod_pb2
from katapod.rpc.status import RpcError, StatusCode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from katapod.agent.sandbox import Agent

__all__ = ["let_go"]


async def let_go(agent: Agent, request: katapod_pb2.LetGoRequest) -> katapod_pb2.LetGoResponse:
    """Raises RpcError (INVALID_ARGUMENT, INTERNAL)."""
    if bool(request.disk) == bool(request.hardware_address):
        raise RpcError(StatusCode.INVALID_ARGUMENT, "cannot let go: the request names no device, or two")
    try:
        if request.disk:
            if not is_uml_place(request.disk):
                raise RpcError(StatusCode.INVALID_ARGUMENT, f"cannot let go of the disk {request.disk[:64]!r}")
            unbind(request.disk)
        else:
            _take_down(parse_mac(request.hardware_address))
    except OSError as exc:
        what = request.disk or request.hardware_address
        raise RpcError(StatusCode.INTERNAL, f"cannot let go of {what}: {exc.strerror}") from exc
    return katapod_pb2.LetGoResponse()


def _take_down(mac: bytes) -> None:
    """Raises OSError."""
    with Netlink() as netlink:
        for link in netlink.links():
            if link.mac == mac and link.flags & IFF_UP and not link.flags & IFF_LOOPBACK:
                netlink.change_link(link.index, up=False)
