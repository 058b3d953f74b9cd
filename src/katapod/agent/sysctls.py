"""Network sysctls: containers share the guest's network namespace, for which crun rejects them."""

from __future__ import annotations

from katapod.rpc.status import RpcError, StatusCode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from katapod.rpc.pb import oci_pb2

__all__ = ["apply_network_sysctls"]

PROC_SYS = "/proc/sys"


def apply_network_sysctls(spec: oci_pb2.Spec, root: str = PROC_SYS) -> None:
    """Set the network sysctls of the spec and remove them from it. Raises RpcError (INVALID_ARGUMENT)."""
    for key in [key for key in spec.Linux.Sysctl if key.replace("/", ".").startswith("net.")]:
        value = spec.Linux.Sysctl[key]
        # with a slash it is a path already, since names of interfaces may have dots
        path = key if "/" in key else key.replace(".", "/")
        if ".." in path.split("/") or "\0" in path:
            raise RpcError(StatusCode.INVALID_ARGUMENT, f"cannot set the sysctl {key[:64]!r}: it does not exist")
        try:
            with open(f"{root}/{path}", "w") as handle:
                handle.write(value)
        except OSError as exc:
            raise RpcError(
                StatusCode.INVALID_ARGUMENT, f"cannot set the sysctl {key[:64]!r} to {value[:64]!r}: {exc.strerror}"
            ) from exc
        del spec.Linux.Sysctl[key]
