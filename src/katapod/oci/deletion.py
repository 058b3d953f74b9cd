"""`delete`: a container and all of it; by its supervisor, or by what is on disk if that was killed or hangs."""

from __future__ import annotations

import os
import time

from katapod.oci.errors import OciError, does_not_exist, not_stopped
from katapod.oci.link import Link
from katapod.oci.records import Record, State, Store
from katapod.oci.wire import Gone

TYPE_CHECKING = False
if TYPE_CHECKING:
    from katapod.oci.arguments import Call

__all__ = ["delete", "delete_container"]

ANSWER_LIMIT_S = 60.0  # a guest on a busy host ends its processes, and writes out what it holds
SIGKILL = 9
PROXY_LIMIT_S = 5.0


def delete(call: Call) -> int:
    delete_container(Store(call.root).record(call.id), force="force" in call.switches)
    return 0


def delete_container(record: Record, *, force: bool) -> None:
    """With `force` whatever state it is in, and no error if it does not exist. Raises OciError."""
    try:
        state = record.read()
    except OciError:
        if force and not os.path.isdir(record.path):
            return
        raise
    if state["status"] not in ("stopped", "created") and not force:
        raise not_stopped(record.id, state["status"])
    supervisor = record.supervisor(state)
    if supervisor.alive() and not _is_stopped(supervisor.lock):
        try:
            with Link.to(supervisor, ANSWER_LIMIT_S) as link:
                answer = link.call({"do": "delete", "id": record.id, "force": force})
                if answer.get("last"):
                    link.wait_end()
            return
        except (Gone, TimeoutError):  # it was killed meanwhile, or hangs
            pass
        except OciError as exc:
            if "does not exist" not in str(exc):
                raise
    if not os.path.isdir(record.path):  # it was removed meanwhile
        if force:
            return
        raise does_not_exist(record.id)
    _remove_from_disk(record, state)


def _is_stopped(lock: str) -> bool:
    """Whether a signal has stopped the supervisor (T in ps(1)): it would not come to see a request. Its lock is found
    in the kernel's list, since a pid on disk may have been used again. host/locks.py takes long to load."""
    try:
        status = os.stat(lock)
        wanted = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
        with open("/proc/locks") as locks:
            pids = [fields[4] for fields in map(str.split, locks) if len(fields) > 5 and fields[5] == wanted]
        with open(f"/proc/{pids[0]}/stat") as handle:
            return handle.read().rpartition(")")[2].split()[0] == "T"
    except (OSError, IndexError):
        return False


def _remove_from_disk(record: Record, state: State) -> None:
    """What is recorded is all that there is. Heavy imports: this is not the usual way."""
    import asyncio
    import contextlib
    from pathlib import Path

    from katapod.host.container_cgroup import remove_container_cgroups
    from katapod.host.locks import lock_holder
    from katapod.host.state import StateStore
    from katapod.model.errors import KatapodError
    from katapod.model.layout import Layout
    from katapod.sandbox.recovery import remove_sandbox

    supervisor = record.supervisor(state)
    holder = lock_holder(Path(supervisor.lock))
    if holder is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(holder, SIGKILL)
    try:
        if state["sandbox"]:
            asyncio.run(remove_sandbox(StateStore(Layout()), state["sandbox"], force=True))
    except KatapodError as exc:
        raise OciError(f"cannot delete {record.id}: {exc}") from exc
    if state["pid"]:
        _wait_proxy(int(state["pid"]))
    remove_container_cgroups(state["cgroups"])
    supervisor.remove()
    record.remove()


def _wait_proxy(pid: int) -> None:
    """It ends with its connection to the supervisor."""
    deadline = time.monotonic() + PROXY_LIMIT_S
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as handle:
                text = handle.read()
        except OSError:
            return
        if "(katapod-proxy)" not in text or text.rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.01)
