"""Which VMM a sandbox gets. Nobody else in this room knows one by name."""

from katapod.vmm.protocol import Vmm
from katapod.vmm.qemu.vmm import Qemu

__all__ = ["DEFAULT_VMM"]

DEFAULT_VMM: Vmm = Qemu()
