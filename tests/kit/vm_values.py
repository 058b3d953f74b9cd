"""Values of VMs for tests."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from msgspec import structs

from katapod.vmm.qemu.command_line import QemuOptions, options_of
from katapod.vmm.spec import VmSpec

__all__ = ["QEMU_FIELDS", "changed_vm"]

QEMU_FIELDS = frozenset(QemuOptions.__struct_fields__)


def changed_vm(vm: VmSpec, change: Mapping[str, Any]) -> VmSpec:
    """With other values of fields of its own, or of QEMU's."""
    qemu = {name: value for name, value in change.items() if name in QEMU_FIELDS}
    rest = {name: value for name, value in change.items() if name not in QEMU_FIELDS}
    return replace(vm, **rest, options=structs.replace(options_of(vm), **qemu)) if qemu else replace(vm, **rest)
