"""`delete`: remove what is left of a container or sandbox, from disk alone: its server may be gone.

containerd runs it at the end of each container, and goes on when it has ended. So it loads what it needs for what is
there: of a container of a pod, whose sandbox goes on, nothing is left but mounts.
Source: core/runtime/v2/README.md of containerd. containerd allows five seconds.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time

from katapod.host.mountinfo import mounts_below
from katapod.model.exit_status import KILLED_STATUS
from katapod.shim.arguments import Arguments
from katapod.shim.pb import task_pb2
from katapod.shim.start import SOCKET_ROOT, StartError, pod_of, read_annotations, socket_path

__all__ = ["delete"]


def delete(arguments: Arguments) -> None:
    """Print a DeleteResponse. Succeeds if nothing is left. Raises KatapodError, OSError."""
    pod = None
    with contextlib.suppress(StartError):  # the bundle is incomplete, or gone already
        pod = pod_of(read_annotations(os.path.join(arguments.bundle, "config.json")), "config.json")
    sockets = _sockets(arguments) if pod is None else []
    if pod is None and _something_is_left(arguments.id, sockets):
        from katapod.shim.leftovers import remove_leftovers

        remove_leftovers(arguments.id, sockets)
    _unmount(os.path.join(arguments.bundle, "rootfs"))
    answer = task_pb2.DeleteResponse(exit_status=KILLED_STATUS)
    answer.exited_at.seconds, answer.exited_at.nanos = divmod(time.time_ns(), 10**9)
    sys.stdout.buffer.write(answer.SerializeToString())
    sys.stdout.buffer.flush()


def _sockets(arguments: Arguments) -> list[str]:
    """Where the server may listen: the default path, or the one that containerd asked for, recorded in the bundle."""
    usual = socket_path(SOCKET_ROOT, arguments.address, arguments.namespace, arguments.id)
    try:
        with open(os.path.join(arguments.bundle, "address")) as address:
            told = address.read().removeprefix("unix://")
    except (OSError, ValueError):
        return [usual]
    return [usual, told] if os.path.basename(told) == os.path.basename(usual) else [usual]


def _something_is_left(sandbox_id: str, sockets: list[str]) -> bool:
    """Or its server has ended in good order."""
    from katapod.model.errors import UsageError
    from katapod.model.ids import parse_container_name
    from katapod.model.layout import Layout

    places = list(sockets)
    with contextlib.suppress(UsageError):  # no sandbox was ever made with an invalid id
        places += map(str, Layout().sandbox(parse_container_name(sandbox_id)).all)
    return any(os.path.lexists(place) for place in places)


def _unmount(rootfs: str) -> None:
    """Raises KatapodError."""
    if mounts_below(rootfs):  # the server has unmounted it, unless it was killed
        from pathlib import Path

        from katapod.host.mounts import unmount_below

        unmount_below(Path(rootfs))
