"""`checkpoint` and `restore`, which are there to be refused: a VM's state is not saved."""

from __future__ import annotations

from katapod.oci.errors import not_saved
from katapod.oci.records import Store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from katapod.oci.arguments import Call

__all__ = ["checkpoint", "restore"]


def checkpoint(call: Call) -> int:
    Store(call.root).record(call.id).read()
    raise not_saved("checkpoint")


def restore(call: Call) -> int:
    raise not_saved("restore")
