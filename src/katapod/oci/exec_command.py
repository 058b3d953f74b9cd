"""`exec`: a further process in a container that runs."""

from __future__ import annotations

import json
import os

from katapod.oci.errors import NOT_RUNNING, OciError
from katapod.oci.foreground import wait_for_end
from katapod.oci.json_file import read_object
from katapod.oci.link import Link
from katapod.oci.records import Store
from katapod.oci.starting import introduce, refuse_descriptors, tell_pid
from katapod.oci.streams import process_streams
from katapod.oci.wire import Gone

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from katapod.oci.arguments import Call

__all__ = ["execute"]

PROCESS_MAX = 1 << 20  # bytes of a --process file


def execute(call: Call) -> int:
    """With --detach returns once it runs; else its exit status. Raises OciError."""
    refuse_descriptors(call)
    if call.values.get("cgroup"):
        raise OciError("cannot use --cgroup: cgroups below the container's are the guest's")
    record = Store(call.root).record(call.id)
    state = record.read()
    if state["status"] not in ("running", "paused"):
        raise OciError(f"cannot exec in a {state['status']} container: {NOT_RUNNING}")
    detach = "detach" in call.switches
    process = _process(call)
    terminal = bool(process.get("terminal")) or "tty" in call.switches
    fds, slave = process_streams(call, {**process, "terminal": terminal}, foreground=not detach)
    request = {
        "do": "exec",
        "id": record.id,
        "terminal": terminal,
        "process": json.dumps(process) if process else "",
        "ignore-paused": "ignore-paused" in call.switches,
        **_options(call),
    }
    try:
        with Link.to(record.supervisor(state)) as link:
            proxy = introduce(link, request, fds, slave, (record.id, "exec"))
    except Gone as exc:
        raise OciError(f"cannot exec in container {record.id}: {NOT_RUNNING}") from exc
    tell_pid(call, proxy.pid)
    return 0 if detach else wait_for_end(proxy.pid, terminal=terminal and slave is None)


def _process(call: Call) -> dict[str, Any]:
    """The object in --process; empty without that option."""
    path = call.values.get("process", "")
    if not path:
        if len(call.operands) < 2:
            raise OciError("process args cannot be empty")
        return {}
    try:
        return read_object(path, PROCESS_MAX)
    except OSError as exc:
        raise OciError(f"cannot read {path}: {os.strerror(exc.errno or 0)}") from exc


def _options(call: Call) -> dict[str, Any]:
    """What a process without a file is to be like."""
    user = call.values.get("user", "")
    parts = user.split(":")
    groups = call.lists.get("additional-gids", [])
    if user and not (len(parts) < 3 and all(part.isascii() and part.isdigit() for part in parts)):
        raise OciError(f"invalid user {user!r}: use UID[:GID]")
    if not all(group.isascii() and group.isdigit() for group in groups):
        raise OciError("invalid --additional-gids: use a number")
    return {
        "args": call.operands[1:],
        "env": call.lists.get("env", []),
        "cwd": call.values.get("cwd", ""),
        "user": user,
        "groups": [int(group) for group in groups],
        "no-new-privs": "no-new-privs" in call.switches,
        "caps": [name.upper() for name in call.lists.get("cap", [])],
    }
