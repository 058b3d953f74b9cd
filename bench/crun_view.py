"""Where crun can work: it takes a host with both cgroup hierarchies for one with the second only.

On such a host it is called in a mount namespace of its own, in which the second hierarchy is not mounted.
"""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

__all__ = ["without_unified_hierarchy"]

UNIFIED = Path("/sys/fs/cgroup/unified")


@contextlib.contextmanager
def without_unified_hierarchy() -> Iterator[tuple[str, ...]]:
    """What to put before crun's command line; empty where it works as it is. Entering costs some 1 ms a call.

    The namespace lives as long as a process that reads from us, so it is gone with us in any case.
    """
    if not UNIFIED.is_mount():
        yield ()
        return
    hold = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", f"umount {UNIFIED} && echo ready && exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert hold.stdin is not None
    assert hold.stdout is not None
    try:
        hold.stdout.readline()  # nothing, if it failed: then crun's first start says what is wrong
        yield ("nsenter", "--target", str(hold.pid), "--mount")
    finally:
        hold.stdin.close()
        hold.wait()
        hold.stdout.close()
