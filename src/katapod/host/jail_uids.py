"""A user id for each sandbox, that no other has while it lives.

An id is taken by a lock on one byte of a file (fcntl(2), open file description locks): it is free again when the
process ends that holds it, however it ends, and there is nothing to clean up.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from katapod.host.locks import free_byte, try_byte
from katapod.model.errors import HostLacks
from katapod.model.tokens import random_below
from katapod.model.uid_range import UidRange

__all__ = ["held_uid"]


@contextlib.contextmanager
def held_uid(uids: UidRange, lock_file: Path) -> Iterator[int]:
    """Take an id of the range that nobody holds and that no process has. Raises HostLacks if there is none, OSError.

    The first that is tried is a random one, so that an id rests before it is used again.
    """
    lock_file.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
    fd = os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        yield _take(fd, uids)
    finally:
        os.close(fd)  # and with it the lock


def _take(fd: int, uids: UidRange) -> int:
    start = random_below(len(uids))
    for offset in range(len(uids)):
        uid = uids.first + (start + offset) % len(uids)
        if not try_byte(fd, uid):
            continue
        if not _has_processes(uid):
            return uid
        free_byte(fd, uid)
    raise HostLacks(
        f"cannot find a user id for a sandbox: all of {uids} are in use", hint="widen jail_uids in configuration.toml"
    )


def _has_processes(uid: int) -> bool:
    """Whether a process of the user is left, such as one that a killed supervisor had started and that is still
    ending. Of other PID namespaces than ours and those in it nothing is seen."""
    try:
        os.getpriority(os.PRIO_USER, uid)
    except ProcessLookupError:
        return False
    return True
