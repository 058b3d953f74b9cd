"""What a VM template is made of, and what tells one from another.

A template is a guest that was stopped when its agent was ready: memory and device state in files. A clone of it
must be given exactly the machine that it was saved from, so the key is taken from all of that machine's
description and from the files that it names; what differs between sandboxes (names, uuid, vsock CID) is left out, and
what a sandbox has beyond the template (vCPUs, memory, devices) is plugged into the clone.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from katapod.vmm.protocol import Vmm
from katapod.vmm.spec import ANY_CID, VmSpec

__all__ = ["TemplateLimits", "TemplatePlan", "clone_of", "plan_template"]

FORMAT = 1  # of the files in a template's directory, and of what the agent does before it is saved
NO_UUID = "00000000-0000-0000-0000-000000000000"
SCRATCH = Path("/scratch")  # stands for the directory of whoever builds
KEY_LENGTH = 24


class TemplateLimits(Struct, frozen=True):
    """When a template is made anew, or goes; how long its guest may take to boot."""

    max_age_s: float
    max_uses: int
    unused_s: float
    others_kept: int = 4  # of other machines, beside a new one: a new guest image makes all of them useless
    boot_s: float = 60.0

    def reached(self, age_s: float, uses: int) -> bool:
        """Whether the next use should be one of a new template. An age below 0: the clock was set back."""
        return not 0 <= age_s <= self.max_age_s or uses >= self.max_uses


class TemplatePlan(Struct, frozen=True):
    """One template. Its files lie in `root`/`key`: memory, state, meta.json, uses."""

    key: str
    root: Path
    vm: VmSpec
    limits: TemplateLimits
    vmm: Vmm

    @property
    def directory(self) -> Path:
        return self.root / self.key

    def describe(self) -> str:
        return f"template {self.key} in {self.root}\n{self.vmm.describe(self.vm)}"


def plan_template(
    vmm: Vmm, wanted: VmSpec, identities: Iterable[str], root: Path, limits: TemplateLimits, *, mem_mib: int
) -> TemplatePlan:
    """Plan the template that a sandbox with the VM `wanted` is cloned from.

    `identities` stand for what the VMM's description does not show: contents of the VMM, kernel and initrd, the host's
    CPU. The template's memory is `mem_mib`, at most what is wanted.
    """
    vm = replace(
        wanted,
        sandbox_id="template",
        uuid=NO_UUID,  # the guest's firmware tables are part of the template: no clone may take it for its own
        mem_mib=min(mem_mib, wanted.mem_mib),
        vcpus=1,
        vm_dir=SCRATCH,
        vsock_cid=None if wanted.vsock_cid is None else ANY_CID,
        memory_is_given=True,
        translation_cache_mib=0,  # no part of the machine: a clone, which runs less code than a boot, may have less
        restored=False,
    )
    text = "\n".join([str(FORMAT), vmm.describe(vm), *identities])
    return TemplatePlan(hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH], root, vm, limits, vmm)


def clone_of(template: TemplatePlan, wanted: VmSpec) -> VmSpec:
    """The VM to restore the template into: its machine, under the sandbox's own names."""
    return replace(
        template.vm,
        sandbox_id=wanted.sandbox_id,
        uuid=wanted.uuid,
        vm_dir=wanted.vm_dir,
        vsock_cid=wanted.vsock_cid,
        uids=wanted.uids,
        uid=wanted.uid,
        translation_cache_mib=wanted.translation_cache_mib,
        restored=True,
    )
