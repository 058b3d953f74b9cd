"""kill -9 of each process of a sandbox in each phase of its life: a named error soon, and nothing left."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults import (
    SHARED,
    STATE,
    Started,
    console_of,
    container_state,
    delete,
    die_hard,
    fresh_name,
    kata,
    leftovers,
    processes_of,
    record_of,
    start,
    start_exec,
    virtiofsd_of,
    vmm_of,
    wait_until,
)

from kit.accel import vmm_name

ERROR_LIMIT_S = 180.0
WRITER = "i=0; while true; do dd if=/dev/zero of=/v/data bs=64k count=16 2>/dev/null; sync; echo x >> /v/mark; done"


def claimed(name: str) -> bool:
    return (STATE / name / "persist.json").exists()


PHASES: dict[str, Callable[[str], object]] = {
    "claimed": claimed,
    "virtiofsd-started": virtiofsd_of,
    "vmm-started": vmm_of,
    "guest-boots": lambda name: record_of(name).get("vmm_pid"),
    "agent-connected": lambda name: record_of(name).get("state") == "running",
    "container-created": lambda name: container_state(name) in ("created", "running"),
    "running": lambda name: container_state(name) == "running",
}


@pytest.fixture
def name() -> Iterator[str]:
    chosen = fresh_name("kill")
    yield chosen
    assert leftovers(chosen) == []


def at(phase: str, running: Started) -> None:
    if phase == "teardown":
        wait_until(phase, lambda: container_state(running.name) == "stopped", period_s=0.001)
    else:
        wait_until(phase, lambda: PHASES[phase](running.name) or running.process.poll() is not None, period_s=0.001)


@pytest.mark.parametrize("phase", [*PHASES, "teardown"])
def test_killed_supervisor_takes_its_vm_along(name: str, phase: str) -> None:
    command = ("true",) if phase == "teardown" else ("sleep", "1000")
    with start("--rm", *SHARED, "busybox", *command, name=name) as running:
        at(phase, running)
        killed = die_hard(running.pid)
        assert running.end().code == -signal.SIGKILL
        wait_until("VMM and virtiofsd are gone", lambda: not processes_of(name))
        print(f"gone after {time.monotonic() - killed:.3f} s")
        removed = delete(name)
        assert (removed.code, removed.err) == (0, "")
        assert leftovers(name) == []


def test_next_run_removes_what_a_killed_supervisor_left(name: str) -> None:
    with start("--rm", *SHARED, "busybox", "sleep", "1000", name=name) as running:
        at("running", running)
        die_hard(running.pid)
        running.end()
        kata("run", "--rm", "no-such-image", "true")
        assert leftovers(name) == []


def test_killed_background_supervisor(name: str) -> None:
    assert kata("run", "-d", "--name", name, "busybox", "sleep", "1000").out == f"{name}\n"
    supervisor = int(str(record_of(name)["supervisor_pid"]))
    die_hard(supervisor)
    wait_until("VMM and virtiofsd are gone", lambda: not processes_of(name))
    other = fresh_name("kill")
    assert kata("run", "--rm", "--name", other, "no-such-image", "true").code == 125
    # it had run and was to be kept: only its record and log stay, and say what became of it
    state = record_of(name)
    if state:
        assert state["state"] == "stopped"
        assert "killed" in str(state["error"])
        assert f"{name}  busybox  sleep 1000  stopped (137)" in re.sub("   +", "  ", kata("list").out)
    assert delete(name).code == 0


@pytest.mark.parametrize("phase", [phase for phase in PHASES if phase not in ("claimed", "virtiofsd-started")])
def test_killed_qemu_is_named(name: str, phase: str) -> None:
    with start("--rm", *SHARED, "busybox", "sleep", "1000", name=name) as running:
        at(phase, running)
        killed = die_hard(wait_for_vmm(name))
        done = running.end()
        took = time.monotonic() - killed
        done.assert_clean_error()
        assert vmm_name() in done.err
        assert "killed by SIGKILL" in done.err
        assert took < ERROR_LIMIT_S, done
        print(f"{phase}: reported after {took:.2f} s: {done.err}")
    assert leftovers(name) == []


def test_killed_qemu_shows_the_consoles_tail(name: str) -> None:
    with start("--rm", "busybox", "sleep", "1000", name=name) as running:
        at("running", running)
        words = f"kata-agent: container {name} started"
        wait_until("words on the console", lambda: words in console_of(name))
        die_hard(wait_for_vmm(name))
        done = running.end().assert_clean_error()
        assert "last lines of the guest's console" in done.err
        assert words in done.err
        assert "\x1b" not in done.err
        assert "[2J" not in done.err


def wait_for_vmm(name: str) -> int:
    wait_until("a VMM", lambda: vmm_of(name))
    return vmm_of(name)


@pytest.mark.parametrize(
    ("phase", "which"),
    [(phase, -1) for phase in PHASES if phase != "claimed"] + [("virtiofsd-started", 0), ("running", 0)],
    ids=lambda value: {0: "parent", -1: "child"}.get(value, value),
)
def test_killed_virtiofsd_is_named(name: str, phase: str, which: int) -> None:
    with start("--rm", *SHARED, "busybox", "sleep", "1000", name=name) as running:
        at(phase, running)
        killed = die_hard(virtiofsd_of(name)[which])
        done = running.end()
        took = time.monotonic() - killed
        done.assert_clean_error()
        assert "virtiofsd ended unexpectedly" in done.err
        assert took < ERROR_LIMIT_S, done
        print(f"{phase}: reported after {took:.2f} s: {done.err}")
    assert leftovers(name) == []


@pytest.mark.core
@pytest.mark.parametrize("victim", ["vmm", "virtiofsd", "supervisor"])
def test_killed_while_writing_to_a_volume(name: str, victim: str, tmp_path: Path) -> None:
    quiet = f"exec 2> /dev/null; {WRITER}"  # a share that has gone is told by its writer, too
    with start("--rm", "-v", f"{tmp_path}:/v", "busybox", "sh", "-c", quiet, name=name) as running:
        wait_until("writes", lambda: (tmp_path / "mark").exists() and (tmp_path / "mark").stat().st_size)
        killed = die_hard({"vmm": vmm_of(name), "virtiofsd": virtiofsd_of(name)[-1], "supervisor": running.pid}[victim])
        done = running.end()
        took = time.monotonic() - killed
        if victim == "supervisor":
            assert delete(name).code == 0
        else:
            done.assert_clean_error()
            assert f"{vmm_name() if victim == 'vmm' else victim} ended unexpectedly" in done.err
            assert took < ERROR_LIMIT_S
    assert leftovers(name) == []
    assert (tmp_path / "mark").read_text().startswith("x\n")  # the user's files are his


@pytest.mark.parametrize("victim", ["vmm", "virtiofsd", "supervisor"])
def test_killed_during_exec(name: str, victim: str, tmp_path: Path) -> None:
    with start("--rm", "-v", f"{tmp_path}:/v", "busybox", "sleep", "1000", name=name) as running:
        at("running", running)
        with start_exec(name, "sh", "-c", "touch /v/in; sleep 1000") as exec_process:
            wait_until("the exec", lambda: (tmp_path / "in").exists())
            killed = die_hard(
                {"vmm": vmm_of(name), "virtiofsd": virtiofsd_of(name)[-1], "supervisor": running.pid}[victim]
            )
            exec_done = exec_process.end()
            took = time.monotonic() - killed
            exec_done.assert_clean_error()
            assert took < ERROR_LIMIT_S
            if victim == "supervisor":
                assert "the kata-runtime that runs the container was killed" in exec_done.err, exec_done.err
            else:
                assert f"{vmm_name() if victim == 'vmm' else victim} ended unexpectedly" in exec_done.err
            running.end()
        if victim == "supervisor":
            assert delete(name).code == 0
    assert leftovers(name) == []


def test_killed_before_it_confirms_an_exec(name: str) -> None:
    with start("--rm", "busybox", "sleep", "1000", name=name) as running:
        at("running", running)
        os.kill(running.pid, signal.SIGSTOP)
        with start_exec(name, "true") as exec_process:
            socket = str(STATE / name / "control.sock")
            wait_until("the exec is connected", lambda: Path("/proc/net/unix").read_text().count(socket) > 1)
            die_hard(running.pid)
            done = exec_process.end().assert_clean_error()
            assert "the kata-runtime that runs the container was killed" in done.err
            running.end()
        assert delete(name).code == 0
    assert leftovers(name) == []


def test_killed_exec_leaves_the_container_alone(name: str, tmp_path: Path) -> None:
    with start(
        "--rm",
        "-v",
        f"{tmp_path}:/v",
        "busybox",
        "sh",
        "-c",
        "until test -e /v/end; do sleep 0.1; done; exit 9",
        name=name,
    ) as running:
        at("running", running)
        with start_exec(name, "sh", "-c", "touch /v/in; sleep 1000") as exec_process:
            wait_until("the exec", lambda: (tmp_path / "in").exists())
            os.kill(exec_process.pid, signal.SIGKILL)
            exec_process.end()
        assert kata("exec", name, "echo", "still").out == "still\n"
        (tmp_path / "end").touch()
        assert running.end().code == 9
    assert leftovers(name) == []
