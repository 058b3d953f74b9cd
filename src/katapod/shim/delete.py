"""`delete`: remove what is left of a container or sandbox whose server may be gone, from what is on disk alone.

Source: facts shim-v2.md, section 3. containerd gives it five seconds.
"""

import asyncio
import contextlib
import os
import signal
import sys
import time
from pathlib import Path

from katapod.host.mounts import unmount_below
from katapod.host.state import StateStore
from katapod.model.layout import Layout
from katapod.sandbox.recovery import remove_sandbox
from katapod.shim.main import Arguments
from katapod.shim.pb import task_pb2
from katapod.shim.start import SOCKET_ROOT, StartError, pod_of, read_annotations, socket_path

__all__ = ["delete"]

KILLED_STATUS = 128 + signal.SIGKILL
OWNER_GRACE_S = 2.0  # of the five seconds


def delete(arguments: Arguments) -> None:
    """Print a DeleteResponse. Succeeds if nothing is left. Raises KatapodError, OSError."""
    bundle = Path(arguments.bundle)
    pod = None
    with contextlib.suppress(StartError):  # the bundle is half made, or gone already
        pod = pod_of(read_annotations(str(bundle / "config.json")), "config.json")
    if pod is None:
        store = StateStore(Layout())
        asyncio.run(remove_sandbox(store, arguments.id, force=True, grace_s=OWNER_GRACE_S))
        path = socket_path(SOCKET_ROOT, arguments.address, arguments.namespace, arguments.id)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    unmount_below(bundle / "rootfs")
    answer = task_pb2.DeleteResponse(exit_status=KILLED_STATUS)
    answer.exited_at.seconds, answer.exited_at.nanos = divmod(time.time_ns(), 10**9)
    sys.stdout.buffer.write(answer.SerializeToString())
    sys.stdout.buffer.flush()
