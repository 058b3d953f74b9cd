"""All sandboxes of this host as they are now: found by their directories, asked side by side, each within a limit.

One that hangs affects its own row only. Concurrent requests share one result.
"""

import asyncio
import os
import time
from collections import deque
from pathlib import Path

import msgspec
from msgspec import Struct

from katapod.host.state import supervisor_alive
from katapod.model.json_text import decode_json
from katapod.model.layout import Layout
from katapod.model.record import SandboxRecord, State
from katapod.model.summary import SandboxSummary
from katapod.monitor.ask import AnswerError, ask
from katapod.monitor.together import ask_together

__all__ = ["Entry", "Event", "Fleet", "Row", "without_secrets"]

SUMMARY_LIMIT_S = 2.0
METRICS_LIMIT_S = 4.5  # Prometheus waits for 10 by default
FRESH_S = 1.0
EVENTS_MAX = 300
RUST_ROOT = Path("/run/kata")  # the sockets of upstream's Rust shim
SOCKET = "shim-monitor.sock"
POD_LABELS = {
    "cri_uid": "io.kubernetes.pod.uid",
    "cri_name": "io.kubernetes.pod.name",
    "cri_namespace": "io.kubernetes.pod.namespace",
}


class Entry(Struct, frozen=True):
    """A sandbox on disk. `record` is None if another runtime owns it, or it cannot be read."""

    sandbox_id: str
    directory: Path
    record: SandboxRecord | None

    @property
    def socket(self) -> str:
        return str(self.directory / SOCKET)

    @property
    def labels(self) -> dict[str, str]:
        """The labels that are added to each sample."""
        known = self.record.labels if self.record is not None else {}
        return {"sandbox_id": self.sandbox_id} | {name: known.get(key, "") for name, key in POD_LABELS.items()}


class Row(msgspec.Struct, frozen=True):
    """A sandbox for the page. `state`: as in the record, or: hangs, lost, pool; `problem` says why."""

    sandbox_id: str
    state: str
    problem: str = ""
    created_at: float = 0.0  # seconds since the epoch; 0: not known
    name: str = ""  # of the pod, with its namespace, or of the image
    image: str = ""
    accelerator: str = ""
    vcpus: int = 0
    mem_mib: int = 0
    addresses: tuple[str, ...] = ()  # of the network that it was attached to by us
    ports: tuple[str, ...] = ()  # published on the host
    use: SandboxSummary | None = None


def without_secrets(row: Row) -> Row:
    """What the metrics show as well: no image, no address, and only problems in our own words."""
    known = row.state in ("hangs", "lost")
    return msgspec.structs.replace(row, image="", addresses=(), ports=(), problem=row.problem if known else "")


class Event(msgspec.Struct, frozen=True):
    """`why` may quote the sandbox's error, and so the guest. `name`: of the pod, with its namespace."""

    at: float  # seconds since the epoch
    sandbox_id: str
    text: str
    why: str = ""
    name: str = ""


class Fleet:
    def __init__(self, layout: Layout, roots: tuple[Path, ...] | None = None) -> None:
        self._layout = layout
        self._roots = roots if roots is not None else (layout.state_root, RUST_ROOT)
        self._records: dict[Path, tuple[tuple[int, int], SandboxRecord | None]] = {}
        self._lock = asyncio.Lock()
        self._taken_at = float("-inf")
        self._rows: list[Row] = []
        self._seen: dict[str, Row] | None = None
        self.events: deque[Event] = deque(maxlen=EVENTS_MAX)

    def entries(self) -> list[Entry]:
        """Those with a record of ours or a management socket. Raises PermissionError."""
        found: dict[str, Entry] = {}
        known: dict[Path, tuple[tuple[int, int], SandboxRecord | None]] = {}
        for root in self._roots:
            try:
                names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False))
            except (FileNotFoundError, NotADirectoryError):
                continue
            for name in names:
                if name.startswith(".") or name in found:
                    continue
                record = self._record(root / name / "persist.json", known)
                if record is not None or (root / name / SOCKET).exists():
                    found[name] = Entry(name, root / name, record)
        self._records = known
        return [found[name] for name in sorted(found)]

    def _record(
        self, path: Path, known: dict[Path, tuple[tuple[int, int], SandboxRecord | None]]
    ) -> SandboxRecord | None:
        """Parsed once per version of the file, which is replaced when it is written."""
        try:
            status = os.stat(path)
            mark = (status.st_ino, status.st_mtime_ns)
            if path in self._records and self._records[path][0] == mark:
                known[path] = self._records[path]
                return known[path][1]
            record = decode_json(path.read_bytes(), SandboxRecord)
        except (OSError, msgspec.DecodeError):
            return None
        known[path] = (mark, record)
        return record

    def find(self, sandbox_id: str) -> Entry | None:
        return next((entry for entry in self.entries() if entry.sandbox_id == sandbox_id), None)

    async def rows(self) -> list[Row]:
        """Everything, at most a second old."""
        async with self._lock:
            if time.monotonic() - self._taken_at > FRESH_S:
                entries = self.entries()
                rows = await ask_together([self._row(entry, "/summary") for entry in entries])
                self._rows = [row or _hanging(entry) for entry, row in zip(entries, rows, strict=True)]
                self._taken_at = time.monotonic()
                self._note_changes()
            return self._rows

    async def row(self, entry: Entry) -> Row:
        """One, with what its guest tells."""
        return await self._row(entry, "/summary?guest=1", METRICS_LIMIT_S)

    async def _row(self, entry: Entry, target: str, limit_s: float = SUMMARY_LIMIT_S) -> Row:
        record = entry.record
        if record is not None and record.at_rest:
            return _row_of(entry, record.shown_state.value, record.error)
        try:
            use = msgspec.json.decode(await ask(entry.socket, target, limit_s), type=SandboxSummary)
        except TimeoutError:
            return _hanging(entry)
        except msgspec.DecodeError:
            return _row_of(entry, _state_of(record), "its response cannot be parsed")
        except AnswerError as exc:
            return self._without_answer(entry, exc)
        if use.vmm_state in ("T", "t"):
            return _row_of(entry, "hangs", "its VMM is stopped by a signal", use)
        return _row_of(entry, _state_of(record), "", use)

    def _without_answer(self, entry: Entry, exc: AnswerError) -> Row:
        record = entry.record
        if record is not None and exc.refused:
            if not supervisor_alive(self._layout.sandbox(entry.sandbox_id)):
                return _row_of(entry, "lost", "the process that ran it was killed")
            if record.state is State.CREATING or record.pooled:
                return _row_of(entry, _state_of(record), "")
        why = "no details: it was started by another version or runtime" if exc.unknown else str(exc)
        return _row_of(entry, _state_of(record), why)

    def _note_changes(self) -> None:
        now = {row.sandbox_id: row for row in self._rows}
        if self._seen is not None:
            for sandbox_id in sorted(now.keys() | self._seen.keys()):
                before, after = self._seen.get(sandbox_id), now.get(sandbox_id)
                known = after or before
                if known is None or (before and after and before.state == after.state):
                    continue
                state = after.state if after else ""
                text = "ended and was removed" if not state else f"is {state}" if state != "hangs" else state
                why = after.problem if after else ""
                self.events.append(Event(time.time(), sandbox_id, text, why, known.name))
        self._seen = now


def _hanging(entry: Entry) -> Row:
    return _row_of(entry, "hangs", "it does not respond")


def _state_of(record: SandboxRecord | None) -> str:
    if record is None:
        return "running"
    return "pool" if record.pooled else record.shown_state.value


def _row_of(entry: Entry, state: str, problem: str, use: SandboxSummary | None = None) -> Row:
    record = entry.record
    if record is None:
        return Row(entry.sandbox_id, state, problem, use=use)
    pod = entry.labels
    name = f"{pod['cri_namespace']}/{pod['cri_name']}" if pod["cri_name"] else ""
    return Row(
        sandbox_id=entry.sandbox_id,
        state=state,
        problem=problem,
        created_at=record.created_at,
        name=name,
        image=record.containers[-1].image if record.containers else "",
        accelerator=record.accelerator,
        vcpus=use.vcpus if use is not None else record.vcpus,
        mem_mib=use.guest_bytes >> 20 if use is not None else record.mem_mib,
        addresses=record.attachment.addresses if record.attachment else (),
        ports=tuple(map(str, record.attachment.ports)) if record.attachment else (),
        use=use,
    )
