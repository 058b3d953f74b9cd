"""What one worker of a test run does for all of them."""

import contextlib
import fcntl
import os
from collections.abc import Iterator

import pytest

__all__ = ["once_a_run"]


@contextlib.contextmanager
def once_a_run(tmp_path_factory: pytest.TempPathFactory, what: str) -> Iterator[bool]:
    """True for the first worker that gets here, while the others wait for the end of its block, and False for them.

    A block that fails has not been: the next worker is the first one.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of the run: each worker has one of its own in it
    done = folder / f"{what}.done"
    with (folder / f"{what}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        is_first = not done.exists()
        yield is_first
        done.touch()
