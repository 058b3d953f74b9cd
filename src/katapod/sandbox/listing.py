"""All sandboxes of this host, from their records alone."""

from msgspec import Struct

from katapod.host.state import StateStore, supervisor_alive
from katapod.model.record import SandboxRecord

__all__ = ["Listed", "is_lost", "list_sandboxes"]


class Listed(Struct, frozen=True):
    """`lost`: its supervisor was killed, and its record says what was true then."""

    record: SandboxRecord
    lost: bool


def list_sandboxes(store: StateStore) -> list[Listed]:
    """Running or stopped, newest first. Machines that a pool keeps ready are nobody's sandboxes, and are left out."""
    records = sorted(store.records(), key=lambda item: -item.created_at)
    return [Listed(record, lost=is_lost(store, record)) for record in records if not record.pooled]


def is_lost(store: StateStore, record: SandboxRecord) -> bool:
    lives = not record.at_rest or bool(record.restart_at)  # or its supervisor waits to start it again
    return lives and not supervisor_alive(store.layout.sandbox(record.sandbox_id))
