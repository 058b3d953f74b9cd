"""Paths in the guest, and the validation of names that become part of a path."""

from __future__ import annotations

from katapod.rpc.status import RpcError, StatusCode

__all__ = [
    "BASE",
    "CGROUP_ROOT",
    "RESOLV_CONF",
    "SANDBOX",
    "SANDBOX_NS",
    "SHARED",
    "bundle_of",
    "check_id",
]

BASE = "/run/kata-containers"
SANDBOX = f"{BASE}/sandbox"
SHARED = f"{BASE}/shared/containers"
RESOLV_CONF = f"{SANDBOX}/resolv.conf"
SANDBOX_NS = "/var/run/sandbox-ns"
CGROUP_ROOT = "/sys/fs/cgroup"
ID_MAX = 200  # bytes; a file name may have 255, and some of ours have a suffix
RESERVED = ("shared", "sandbox", "image", "virtual-volumes")  # names in BASE with another meaning


def check_id(text: str, what: str) -> str:
    """Return `text` if it is safe as a file name. Raises RpcError (INVALID_ARGUMENT)."""
    good = text.isascii() and all(char.isalnum() or char in "._-" for char in text) and text[:1].isalnum()
    if not good or len(text) > ID_MAX or text in RESERVED:
        raise RpcError(StatusCode.INVALID_ARGUMENT, f"invalid {what}: {text[:ID_MAX]!r}")
    return text


def bundle_of(container_id: str) -> str:
    return f"{BASE}/{container_id}"
