"""Locks between processes of this host, by flock(2) and on single bytes of a file: who has one, and waiting for one. A
lock is free when its holder ends, however it ends; a holder that is stopped by a signal keeps it."""

import asyncio
import contextlib
import fcntl
import os
import struct
from collections.abc import AsyncIterator
from pathlib import Path

from katapod.model.errors import KatapodError

__all__ = ["FLOCK", "POLL_S", "LockTaken", "free_byte", "is_stopped", "lock_holder", "locked", "try_byte"]

POLL_S = 0.02  # flock(2) has no limit of time, and a thread that waits in it cannot be called back
FLOCK = struct.Struct("hhqqi4x")  # struct flock, 64-bit: l_type, l_whence, l_start, l_len, l_pid


class LockTaken(KatapodError):
    """Another process has the lock; `holder` is its id, if that is known."""

    def __init__(self, what: str, *, hint: str = "", holder: int | None = None, **context: object) -> None:
        super().__init__(what, hint=hint, **context)
        self.holder = holder


def lock_holder(path: Path) -> int | None:
    """The process that holds the lock, from the kernel's own list: a pid on disk may have been used again."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    wanted = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if len(fields) >= 6 and fields[1] == "FLOCK" and fields[5] == wanted:
            return int(fields[4])
    return None


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped the process (T in ps(1)). One that a tracer has stopped (t) soon goes on. Source:
    proc(5), /proc/pid/stat."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] == "T"


@contextlib.asynccontextmanager
async def locked(path: Path, limit_s: float, what: str) -> AsyncIterator[None]:
    """Hold the lock `path` while the block runs.

    Raises LockTaken if another process has it for `limit_s`: "cannot `what`: ..."; FileNotFoundError if its directory
    is gone, KatapodError.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        raise
    except OSError as exc:
        raise KatapodError(f"cannot open {path}: {exc.strerror}") from exc
    try:
        loop = asyncio.get_running_loop()
        end = loop.time() + limit_s
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if loop.time() >= end:
                    raise _taken(path, limit_s, what) from None
            await asyncio.sleep(POLL_S)
        yield
    finally:
        os.close(fd)


def _taken(path: Path, limit_s: float, what: str) -> LockTaken:
    holder = lock_holder(path)
    if not holder:
        return LockTaken(f"cannot {what}: another process has been at it for {limit_s:g} s", hint="try again")
    if is_stopped(holder):
        return LockTaken(
            f"cannot {what}: process {holder} is in the midst of a change, and is stopped by a signal",
            hint=f"let it go on: kill -CONT {holder}",
            holder=holder,
        )
    said = f"cannot {what}: process {holder} has been at it for {limit_s:g} s"
    return LockTaken(said, hint="try again", holder=holder)


def try_byte(fd: int, place: int) -> bool:
    """Lock one byte of a file for as long as the descriptor is open (fcntl(2), open file description locks); False if
    another has it. Raises OSError."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, place, 1, 0))
    except (BlockingIOError, PermissionError):  # EAGAIN, EACCES
        return False
    return True


def free_byte(fd: int, place: int) -> None:
    """Raises OSError."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, place, 1, 0))
