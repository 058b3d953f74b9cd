"""Locks between processes, one of which is stopped by a signal."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from katapod.host.locks import LockTaken, is_stopped, lock_holder, locked

HOLD = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(fd, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process, which has the lock until its standard input ends."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def stop(process: "subprocess.Popen[str]") -> None:
    os.kill(process.pid, signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)


async def test_a_lock_that_is_free(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert lock_holder(path) is None
    async with locked(path, 60.0, "do it"):
        assert lock_holder(path) == os.getpid()
        with pytest.raises(LockTaken, match=r"cannot do it: process \d+ has been at it for 0\.05 s"):
            async with locked(path, 0.05, "do it"):
                pass
    assert lock_holder(path) is None
    with pytest.raises(FileNotFoundError):
        async with locked(tmp_path / "gone" / "lock", 1.0, "do it"):
            pass


async def test_one_that_ends_gives_its_lock_away(tmp_path: Path, holder: "subprocess.Popen[str]") -> None:
    holder.kill()
    async with locked(tmp_path / "lock", 60.0, "do it"):
        pass


async def test_one_that_is_stopped_keeps_its_lock(tmp_path: Path, holder: "subprocess.Popen[str]") -> None:
    assert not is_stopped(holder.pid)
    stop(holder)
    assert is_stopped(holder.pid)
    with pytest.raises(LockTaken, match="is in the midst of a change, and is stopped by a signal") as caught:
        async with locked(tmp_path / "lock", 0.05, "do it"):
            pass
    assert (caught.value.holder, caught.value.hint) == (holder.pid, f"let it go on: kill -CONT {holder.pid}")
    os.kill(holder.pid, signal.SIGCONT)


def test_a_process_that_has_ended_is_not_stopped(holder: "subprocess.Popen[str]") -> None:
    holder.kill()
    holder.wait()
    assert not is_stopped(holder.pid)
