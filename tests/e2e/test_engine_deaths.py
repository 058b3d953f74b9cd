"""Something is killed at each step of what Podman and Docker do: they hear of it, and their own clean-up works."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from katapod.oci.records import SupervisorDir
from kit.docker import Docker, docker_here
from kit.kata import wait_for
from kit.leaks import claim
from kit.podman import Podman, podman_here

Engine = Podman | Docker

LIMIT_S = 240.0  # only against hanging
NO_NETWORK = ("--network", "none", "--name", "box")
PARTS = ("proxy", "supervisor", "vmm")


@pytest.fixture(scope="module", params=["podman", "docker"])
def engine_here(request: pytest.FixtureRequest) -> Iterator[Engine]:
    name = str(request.param)
    if shutil.which("dockerd" if name == "docker" else name) is None:
        pytest.skip(f"{name} is not installed")
    opened: contextlib.AbstractContextManager[Engine] = podman_here() if name == "podman" else docker_here()
    with opened as found:
        yield found


@pytest.fixture
def engine(engine_here: Engine) -> Iterator[Engine]:
    yield engine_here
    engine_here("rm", "-f", "box")


def part_of(engine: Engine, container: str, part: str) -> int:
    state = json.loads((engine.states / container / "state.json").read_text())
    if part == "proxy":
        return int(state["pid"])
    record = json.loads(Path(f"/run/vc/sbs/{state['sandbox']}/persist.json").read_text())
    return int(record[f"{part}_pid"])


def value(engine: Engine, key: str) -> str:
    return engine.ok("inspect", "box", "--format", f"{{{{.State.{key}}}}}").strip()


def wait_ended(engine: Engine) -> None:
    wait_for(lambda: value(engine, "Status") == "exited", "the end of the container")


def remove(engine: Engine, container: str) -> None:
    engine.ok("rm", "-f", "box")
    assert not [name for name in os.listdir(engine.states) if container in name]


@contextlib.contextmanager
def beside(words: list[str]) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("part", PARTS)
def test_while_it_runs(engine: Engine, part: str) -> None:
    """The exec in it ends, too; the container can be started again."""
    box = engine.start(*NO_NETWORK, engine.image, "sleep", "1000")
    with beside(engine.command("exec", "box", "sh", "-c", "echo in; exec sleep 1000")) as executing:
        assert executing.stdout is not None
        assert executing.stdout.readline() == "in\n"
        os.kill(part_of(engine, box, part), signal.SIGKILL)
        assert executing.wait(LIMIT_S) != 0
    wait_ended(engine)
    assert value(engine, "ExitCode") == "137"
    engine.ok("start", "box")
    assert engine("exec", "box", "sh", "-c", "exit 9").code == 9
    remove(engine, box)


@pytest.mark.parametrize("part", PARTS)
def test_while_it_is_stopped(engine: Engine, part: str) -> None:
    loop = "trap 'echo got it' TERM; echo ready; while :; do sleep 0.1; done"
    box = engine.start(*NO_NETWORK, engine.image, "sh", "-c", loop)
    wait_for(lambda: engine.ok("logs", "box") == "ready\n", "the first line of the log")
    with beside(engine.command("stop", "-t", "200", "box")) as stopping:
        wait_for(lambda: "got it" in engine.ok("logs", "box"), "the signal to arrive")
        os.kill(part_of(engine, box, part), signal.SIGKILL)
        said, _ = stopping.communicate(timeout=LIMIT_S)
        assert stopping.returncode == 0, said
    wait_ended(engine)
    remove(engine, box)


def _new_supervisor(engine: Engine, before: set[str]) -> str:
    """The name of the directory of one that has just been started; empty before."""
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(set(os.listdir(engine.states)) - before):
            if name.startswith(".") and SupervisorDir(str(engine.states), name[1:]).alive():
                return name[1:]
    return ""


def _holder(engine: Engine, sandbox: str) -> int:
    status = os.stat(engine.states / f".{sandbox}" / "lock")
    wanted = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    return next(int(fields[4]) for fields in lines if len(fields) > 5 and fields[5] == wanted)


def test_while_it_is_created(engine: Engine) -> None:
    """The engine removes nothing then but what it has recorded itself."""
    before = set(os.listdir(engine.states)) if engine.states.exists() else set()
    with beside(engine.command("run", "-d", *NO_NETWORK, engine.image, "sleep", "1000")) as running:
        wait_for(lambda: _new_supervisor(engine, before), "a supervisor")
        sandbox = _new_supervisor(engine, before)
        claim(sandbox)
        os.kill(_holder(engine, sandbox), signal.SIGKILL)
        assert running.wait(LIMIT_S) in (125, 126, 127)
    remove(engine, sandbox)
    engine.start(*NO_NETWORK, engine.image, "sleep", "1000")
    engine.ok("rm", "-f", "box")
