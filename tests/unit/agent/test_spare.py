"""A crun that waits for the next exec; a script has its place, which reads what crun would read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from katapod.agent import crun
from katapod.agent.loop import Loop
from katapod.agent.program import ProgramError
from katapod.agent.spare import Spare, open_spare

SCRIPT = """#!/bin/sh
while [ "$1" != --process ]; do shift; done
said=$(cat "$2")
[ "$said" = bad ] && exit 3
echo "$said"
"""


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def spare(loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Spare:
    script = tmp_path / "crun"
    script.write_text(SCRIPT)
    script.chmod(0o755)
    monkeypatch.setattr(crun, "sealed_binary", lambda: str(script))
    monkeypatch.setattr(crun, "LOG_DIRECTORY", str(tmp_path))
    return open_spare(loop, "c1", str(tmp_path), 0)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_it_runs_what_it_is_told(loop: Loop, spare: Spare) -> None:
    assert spare.tell("hello", 0)
    loop.run(spare.call.finish())
    assert os.read(spare.stdio.stdout.fd, 100) == b"hello\n"
    assert spare.gone.done
    spare.drop()  # does nothing any more
    assert os.path.isdir(spare.directory)
    spare.stdio.close()


def test_its_failure_is_a_launchs(loop: Loop, spare: Spare) -> None:
    assert spare.tell("bad", 0)
    with pytest.raises(ProgramError, match="crun exec failed"):
        loop.run(spare.call.finish())
    spare.stdio.close()


def test_dropped_it_ends_and_leaves_nothing(loop: Loop, tmp_path: Path, spare: Spare) -> None:
    before = open_files()
    spare.drop()
    spare.drop()
    assert loop.run(loop.wait_any([spare.call.program.exit_status], 60.0))
    assert open_files() == before - 4  # three streams and the pipe
    assert os.listdir(tmp_path) == ["crun"]


def test_what_is_too_long_for_its_pipe_is_for_another_crun(loop: Loop, spare: Spare) -> None:
    assert not spare.tell("x" * (1 << 20), 0)
    assert spare.gone.done
    assert loop.run(loop.wait_any([spare.call.program.exit_status], 60.0))


def test_one_that_has_been_killed_is_not_told(loop: Loop, spare: Spare) -> None:
    spare.call.program.kill()
    assert loop.run(loop.wait_any([spare.call.program.exit_status], 60.0))
    assert not spare.tell("hello", 0)
    assert not os.path.exists(spare.directory)
