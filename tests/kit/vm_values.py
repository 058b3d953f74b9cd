"""Values of VMs for tests."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import structs
from msgspec.structs import replace

from katapod.vmm.qemu.command_line import QemuOptions, options_of
from katapod.vmm.spec import Accelerator, VmSpec

__all__ = ["QEMU_FIELDS", "SMALL_VM", "changed_vm"]

QEMU_FIELDS = frozenset(QemuOptions.__struct_fields__)
SMALL_VM = VmSpec(
    sandbox_id="s1",
    uuid="6f1d7f5c-0000-4000-8000-000000000001",
    program="/usr/bin/qemu-system-x86_64",
    kernel=Path("/img/vmlinux"),
    initrd=Path("/img/initrd"),
    accelerator=Accelerator.TCG,
    mem_mib=256,
    max_mem_mib=2048,
    vcpus=1,
    max_vcpus=4,
    vm_dir=Path("/run/vc/vm/s1"),
    options=QemuOptions(memory_slots=10),
)


def changed_vm(vm: VmSpec, change: Mapping[str, Any]) -> VmSpec:
    """With other values of fields of its own, or of QEMU's."""
    qemu = {name: value for name, value in change.items() if name in QEMU_FIELDS}
    rest = {name: value for name, value in change.items() if name not in QEMU_FIELDS}
    return replace(vm, **rest, options=structs.replace(options_of(vm), **qemu)) if qemu else replace(vm, **rest)
