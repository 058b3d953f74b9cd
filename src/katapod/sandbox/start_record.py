"""The record of a sandbox while it starts: on disk before each thing that it names is acquired."""

import asyncio
from typing import Any

import msgspec

from katapod.host.state import StateStore
from katapod.host.trace import span
from katapod.model.attachment import AttachmentRecord
from katapod.model.record import SandboxRecord

__all__ = ["Attaching", "StartRecord"]

Attaching = asyncio.Task[AttachmentRecord]
"""CNI plugins at work on the sandbox's network namespace; gives the record with their result, or raises."""


class StartRecord:
    """Called with changes of the record, it has them on disk when it returns."""

    def __init__(self, store: StateStore, record: SandboxRecord, attaching: Attaching | None = None) -> None:
        self._store = store
        self._record = record
        self._attaching = attaching

    def __call__(self, **changes: Any) -> None:
        self._record = msgspec.structs.replace(self._record, **changes)
        self._store.write(self._record)

    async def wait_attached(self) -> None:
        """Return once the plugins have put their interfaces into the namespace. Raises KatapodError."""
        if self._attaching is not None:
            with span("wait for the network"):
                self(attachment=await asyncio.shield(self._attaching))
