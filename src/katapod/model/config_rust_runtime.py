"""The Rust runtime's configuration.toml: what it names or places otherwise, read as the Go runtime's.

What it has beyond is in config_refused.py. Source: Kata Containers,
src/runtime-rs/config/configuration-qemu-runtime-rs.toml.in.
"""

from collections.abc import Mapping
from typing import Any, Final

__all__ = ["as_go_setting", "nested_factory"]

_MOVED: Final = {
    ("hypervisor.qemu", "seccomp_sandbox"): ("hypervisor.qemu", "seccompsandbox"),
    ("hypervisor.qemu", "selinux_label"): ("runtime", "guest_selinux_label"),
    ("agent.kata", "create_container_timeout"): ("runtime", "create_container_timeout"),
}
_DEBUG_LEVELS = ("debug", "trace")
_DRIVERS = {"virtio-blk-pci": "virtio-blk"}


def as_go_setting(table: str, key: str, value: object) -> tuple[str, str, object]:
    """The same setting as the Go runtime names it; as it is, if both have it."""
    if key == "log_level" and value in _DEBUG_LEVELS and table in ("agent.kata", "runtime"):
        return table, "enable_debug", True
    if key == "block_device_driver" and isinstance(value, str):
        return table, key, _DRIVERS.get(value, value)
    table, key = _MOVED.get((table, key), (table, key))
    return table, key, value


def nested_factory(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The keys of [hypervisor.qemu.factory], which are those of [factory]; none if there is no such table."""
    inner = content.get("factory")
    return inner if isinstance(inner, dict) else {}
