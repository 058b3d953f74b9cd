"""Users of VMs and jails that tests start themselves: a range for each worker, so that none ends another one's."""

import os

from katapod.model.uid_range import DEFAULT_UIDS

__all__ = ["JAIL_UID", "UML_DISKS_UID", "UML_UID", "VM_UID"]

_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_FIRST = DEFAULT_UIDS.last - 0xFFF + 0x100 * (_WORKER % 16)

UML_UID = _FIRST
VM_UID = _FIRST + 0x40
JAIL_UID = _FIRST + 0x80
"""Of the first; some tests have twenty at once."""
UML_DISKS_UID = _FIRST + 0xC0
