"""Connections to a supervisor: one that a signal has stopped is told of."""

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from katapod.host.state import StateStore
from katapod.model.record import SandboxRecord, State
from katapod.sandbox.client import connect_control
from kit.library import layout_below


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[int]:
    """A process that stands for the supervisor of "s1", whose socket listens."""
    store = StateStore(layout_below(tmp_path))
    with subprocess.Popen(["sleep", "100"]) as process, socket.socket(socket.AF_UNIX) as listener:
        os.close(store.create(SandboxRecord("s1", 1.0, process.pid, "b", state=State.RUNNING)))
        listener.bind(str(store.layout.sandbox("s1").control_socket))
        listener.listen()
        yield process.pid
        process.kill()


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    os.waitpid(pid, os.WUNTRACED)


async def test_one_that_runs(tmp_path: Path, supervisor: int, caplog: pytest.LogCaptureFixture) -> None:
    async with connect_control(StateStore(layout_below(tmp_path)), "s1"):
        assert caplog.messages == []


async def test_one_that_is_stopped(tmp_path: Path, supervisor: int, caplog: pytest.LogCaptureFixture) -> None:
    stop(supervisor)
    async with connect_control(StateStore(layout_below(tmp_path)), "s1"):
        (said,) = caplog.messages
    assert f"process {supervisor}, is stopped by a signal, and answers once it goes on: kill -CONT {supervisor}" in said
