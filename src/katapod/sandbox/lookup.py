"""Which sandbox somebody means: by its id or name, a unique beginning of an engine's id, or a container inside.

Reads records only. A container of a pod has an id, and the name that its engine gave it (an annotation of its spec).
Only the 64 digits that engines give have beginnings: `db` must not mean `db-backup` once `db` is gone.
"""

import contextlib
import json
import re

from msgspec import Struct

from katapod.host.state import StateStore
from katapod.model.errors import KatapodError, NotFound, UsageError
from katapod.model.ids import MAX_ID_LENGTH, parse_container_name
from katapod.model.record import SandboxRecord

__all__ = ["NAME_KEYS", "Found", "container_name", "find_sandbox"]

NAME_KEYS = (
    "io.kubernetes.cri.container-name",  # containerd
    "io.kubernetes.cri-o.ContainerName",
    "io.kubernetes.container.name",
    "nerdctl/name",
)
PREFIX_MIN = 4  # digits
_BEGINNING = re.compile(rf"[0-9a-f]{{{PREFIX_MIN},{MAX_ID_LENGTH - 1}}}")
_LONG_ID = re.compile(rf"[0-9a-f]{{{MAX_ID_LENGTH}}}")
SHOWN = 5  # sandboxes that are named when it is not clear which is meant


class Found(Struct, frozen=True):
    """`container_id`: the container that was named; empty if the sandbox was."""

    record: SandboxRecord
    container_id: str = ""


def find_sandbox(store: StateStore, text: str) -> Found:
    """The sandbox that `text` names. What fits exactly wins over beginnings, a sandbox over its containers.

    Machines that are kept ready are nobody's sandboxes, and are left out. Raises NotFound, UsageError if several fit.
    """
    parse_container_name(text)
    records = [record for record in store.records() if not record.pooled]
    named = [Found(record) for record in records]
    inside = [Found(record, item.container_id) for record in records for item in record.containers]
    for fits in (
        [found for found in named if found.record.sandbox_id == text],
        [found for found in inside if found.container_id == text],
        [found for found in inside if container_name(store, found.record, found.container_id) == text],
        [found for found in named if _begins(found.record.sandbox_id, text)],
        [found for found in inside if _begins(found.container_id, text)],
    ):
        sandboxes = {found.record.sandbox_id for found in fits}
        if len(sandboxes) > 1:
            shown = ", ".join(sorted(sandboxes)[:SHOWN]) + (", ..." if len(sandboxes) > SHOWN else "")
            raise UsageError(f"cannot tell which sandbox {text!r} means: {shown}", hint="give more of its id")
        if fits:
            return fits[0] if len(fits) == 1 else Found(fits[0].record)
    if text in store.ids():
        return Found(store.read(text))  # it has a record that cannot be read: says so
    raise NotFound(f"cannot find {text}: no such container or sandbox", hint=_WHERE)


_WHERE = "see: kata-runtime list, crictl pods, ctr containers list"


def _begins(known: str, text: str) -> bool:
    return bool(_BEGINNING.fullmatch(text) and _LONG_ID.fullmatch(known)) and known.startswith(text)


def container_name(store: StateStore, record: SandboxRecord, container_id: str) -> str:
    """The name that an engine gave a container of a pod; empty if it has none."""
    with contextlib.suppress(OSError, ValueError, KatapodError, AttributeError):
        path = store.layout.sandbox(record.sandbox_id, record.machine_id).spec(container_id)
        annotations = json.loads(path.read_bytes()).get("annotations") or {}
        return next((str(annotations[key]) for key in NAME_KEYS if key in annotations), "")
    return ""
