"""The record of a sandbox while it starts: on disk before each thing that it names is acquired."""

import asyncio
import os
import time
from typing import Any

import msgspec

from katapod.host.device_file import DeviceFile
from katapod.host.facts import HostFacts
from katapod.host.state import StateStore
from katapod.host.trace import span
from katapod.model.attachment import AttachmentRecord
from katapod.model.devices import DeviceRecord
from katapod.model.record import SandboxRecord

__all__ = ["Attaching", "StartRecord", "new_record"]

Attaching = asyncio.Task[AttachmentRecord]
"""CNI plugins at work on the sandbox's network namespace; gives the record with their result, or raises."""


def new_record(
    sandbox_id: str, facts: HostFacts, *, auto_remove: bool, again: SandboxRecord | None = None, **fields: Any
) -> SandboxRecord:
    """The first record of a sandbox that this process is going to own; `again`: its last one, if it was there."""
    if again is not None:
        fields |= {"lasting": True, "restarts": again.restarts}
    return SandboxRecord(
        sandbox_id=sandbox_id,
        created_at=time.time() if again is None else again.created_at,
        supervisor_pid=os.getpid(),
        boot_id=facts.boot_id,
        auto_remove=auto_remove,
        **fields,
    )


class StartRecord:
    """Called with changes of the record, it has them on disk when it returns."""

    def __init__(self, store: StateStore, record: SandboxRecord, attaching: Attaching | None = None) -> None:
        self._store = store
        self._record = record
        self._attaching = attaching

    def __call__(self, *, devices: DeviceRecord | None = None, **changes: Any) -> None:
        if devices is not None:
            DeviceFile(self._store.layout.sandbox(self._record.sandbox_id)).write(devices)
        if not changes:
            return
        self._record = msgspec.structs.replace(self._record, **changes)
        self._store.write(self._record)

    async def wait_attached(self) -> None:
        """Return once the plugins have put their interfaces into the namespace. Raises KatapodError."""
        if self._attaching is not None:
            with span("wait for the network"):
                self(attachment=await asyncio.shield(self._attaching))
