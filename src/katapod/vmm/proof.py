"""The proof of an accelerator as data: what is booted for it, and what is found. judge.py says what a failure means.

What is proven is the machine that sandboxes start with, so whatever changes that machine is proven anew. A failure
counts against an accelerator only where it speaks of it; a host that is short of something for a while says nothing.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from katapod.vmm.protocol import Vmm
from katapod.vmm.spec import ANY_CID, NO_REMEDY, Accelerator, CpuRemedy, VmSpec

__all__ = ["PROOF_MEM_MIB", "RUNGS", "AcceleratorChoice", "ProofPlan", "plan_proof"]

PROOF_MEM_MIB = 512
SCRATCH = Path("/proof")  # stands for the directory of the process that proves
PROOF_UUID = "00000000-0000-0000-0000-000000000000"
KEY_LENGTH = 24

RUNGS = {Accelerator.KVM: "KVM", Accelerator.UML: "User-mode Linux", Accelerator.TCG: "emulation"}
"""What people call the accelerators."""


class AcceleratorChoice(Struct, frozen=True):
    """The accelerator to use. `key` names what it was found for; empty if nothing was proven."""

    accelerator: Accelerator
    reason: str
    fresh: bool  # found just now: the user is told
    remedy: CpuRemedy = NO_REMEDY
    advice: str = ""  # what to set, or empty
    said: str = ""  # the VMM's own words, of the boots that failed
    key: str = ""
    age_s: float | None = None  # of a choice that was kept
    console: str = ""  # the last lines of a guest that did not boot; not kept

    def beside(self, other: "AcceleratorChoice") -> "AcceleratorChoice":
        """This one, with what was found of another accelerator, which does not work either."""
        reason, advice = f"{self.reason}; {other.reason}", self.advice or other.advice
        return replace(self, reason=reason, advice=advice, fresh=self.fresh or other.fresh)

    def describe(self) -> str:
        """One line for people."""
        return f"using {self.accelerator.value}: {self.reason}" + (f" ({self.advice})" if self.advice else "")


class ProofPlan(Struct, frozen=True):
    """A question: does this machine boot under its accelerator?

    `key` is equal for plans that have one answer. `scope` leaves out what the guest is told (initrd, kernel
    parameters): a host on which guests hang makes those of the same scope hang, and need not be asked for each.
    """

    key: str
    scope: str
    vm: VmSpec
    vmm: Vmm

    def with_remedy(self, remedy: CpuRemedy) -> VmSpec:
        return replace(self.vm, remedy=remedy)


def plan_proof(vmm: Vmm, wanted: VmSpec, identities: Sequence[str], *, initrd_identity: str) -> ProofPlan:
    """Plan the proof of the machine `wanted`: as the VMM describes it, under other names and of a fixed size.

    `identities` stand for what that does not show: contents of the VMM, kernel and firmware, KVM's settings.
    What backs memory is left out: a host without a free huge page is short of them, whatever its KVM can do.
    """
    vm = replace(
        wanted,
        sandbox_id="proof",
        uuid=PROOF_UUID,
        mem_mib=PROOF_MEM_MIB,
        max_mem_mib=max(PROOF_MEM_MIB, wanted.max_mem_mib),
        vcpus=1,
        vm_dir=SCRATCH,
        vsock_cid=None if wanted.vsock_cid is None else ANY_CID,
        preallocated=False,
        hugepages=False,
        memory_is_given=False,
        restored=False,
        remedy=NO_REMEDY,
        options=wanted.options.without_onlookers(),
    )
    key = _digest([*vmm.describe(vm).splitlines(), *identities, initrd_identity])
    return ProofPlan(key, _digest([*vmm.describe_for_host(vm).splitlines(), *identities]), vm, vmm)


def _digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:KEY_LENGTH]
