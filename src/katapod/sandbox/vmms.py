"""Which VMM a sandbox gets, by its accelerator. Nobody else in this room knows one by name."""

from katapod.vmm.protocol import Vmm
from katapod.vmm.qemu.vmm import Qemu
from katapod.vmm.spec import Accelerator

__all__ = ["DEFAULT_VMM", "LADDER", "vmm_of"]

DEFAULT_VMM: Vmm = Qemu()

LADDER = (Accelerator.KVM, Accelerator.UML, Accelerator.TCG)
"""What `auto` tries, best first: docs/adr/0041-a-ladder-of-vmms.md."""


def vmm_of(accelerator: Accelerator) -> Vmm:
    if accelerator is not Accelerator.UML:
        return DEFAULT_VMM
    from katapod.vmm.uml.vmm import Uml  # 2 ms that others need not pay

    return Uml()
