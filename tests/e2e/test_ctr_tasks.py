"""What `ctr tasks` does with a container that runs: exec, signals, pause, processes, metrics, removal."""

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pexpect
import pytest

from kit.containerd import Containerd
from kit.kata import Result, wait_for
from kit.oci_archive import BUSYBOX
from kit.templates import kata_command
from kit.terminal import open_terminal

OBEDIENT = "trap 'echo ends; exit 5' TERM; echo up; while :; do sleep 0.1; done"


def start(ctr: Containerd, runtime: str, *command: str, flags: tuple[str, ...] = ()) -> str:
    container = ctr.new_id()
    ctr.ok("run", "--detach", "--runtime", runtime, *flags, BUSYBOX, container, *command)
    return container


def inside(ctr: Containerd, container: str, script: str) -> Result:
    """What a shell says that is run in the container."""
    return ctr("tasks", "exec", "--exec-id", f"e{ctr.new_id()}", container, "sh", "-c", script)


@pytest.mark.core
@pytest.mark.reference
def test_life_of_a_task(ctr: Containerd, runtime: str, tmp_path: Path) -> None:
    """Every step and its event, in order."""
    log = tmp_path / "log"
    with ctr.events() as events:
        container = start(ctr, runtime, "sh", "-c", OBEDIENT, flags=("--log-uri", f"file://{log}"))
        wait_for(lambda: log.read_text() == "up\n", "the container says up")
        assert ctr.tasks() == {container: "RUNNING"}
        ctr.ok("tasks", "kill", "--signal", "SIGTERM", container)
        wait_for(lambda: ctr.tasks() == {container: "STOPPED"}, "the task is stopped")
        assert log.read_text() == "up\nends\n"
        assert ctr.delete(container) == 5
        assert ctr.tasks() == {}
        ctr.ok("containers", "delete", container)
        wait_for(lambda: events.of("/containers/delete", container), "the last event")
        topics = [topic for topic in events.topics(container) if topic.startswith("/tasks/")]
    assert topics == ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]


@pytest.mark.core
@pytest.mark.reference
def test_exec(ctr: Containerd, runtime: str) -> None:
    container = start(ctr, runtime, "sleep", "1000")
    command = ["sh", "-c", "echo out; echo err >&2; exit 3"]
    assert ctr("tasks", "exec", "--exec-id", "e1", container, *command) == (3, "out\n", "err\n")
    assert ctr("tasks", "exec", "--exec-id", "e2", container, "cat", input="words\n") == (0, "words\n", "")
    assert ctr("tasks", "exec", "--exec-id", "e3", "--cwd", "/usr/bin", container, "pwd") == (0, "/usr/bin\n", "")
    missing = ctr("tasks", "exec", "--exec-id", "e4", container, "/no/such/program")
    assert missing.code != 0
    assert "/no/such/program" in missing.stderr
    assert ctr.tasks() == {container: "RUNNING"}


@pytest.mark.timeout(900)  # they are many
def test_two_hundred_execs_at_once(ctr: Containerd, runtime: str) -> None:
    """On one vCPU they take their turns, and what the container does goes on. Some come by our own command, which goes
    by the sandbox's control socket."""
    container = start(ctr, runtime, "sleep", "1000")
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(ctr.spawn("tasks", "exec", "--exec-id", f"m{number}", container, "true"))
            for number in range(180)
        ]
        running += [
            stack.enter_context(subprocess.Popen(kata_command("exec", container, "true"), stdin=subprocess.DEVNULL))
            for _ in range(20)
        ]
        try:
            ended = [process.wait(timeout=800) for process in running]
        finally:
            for process in running:
                process.kill()
        assert ended == [0] * 200
    assert ctr.tasks() == {container: "RUNNING"}
    assert inside(ctr, container, "echo alive") == (0, "alive\n", "")


def test_exec_sees_the_container(ctr: Containerd, runtime: str) -> None:
    container = start(ctr, runtime, "sh", "-c", "echo here > /tmp/mark; exec sleep 1000")
    wait_for(lambda: inside(ctr, container, "cat /tmp/mark") == (0, "here\n", ""), "the mark")
    listed = ctr.ok("tasks", "exec", "--exec-id", "e2", container, "ps", "-o", "pid,args")
    assert "1 sleep 1000" in listed


@pytest.mark.reference
def test_exec_with_a_terminal(ctr: Containerd, runtime: str) -> None:
    container = start(ctr, runtime, "sleep", "1000")
    command = ctr.command("tasks", "exec", "--exec-id", "e1", "-t", container, "sh")
    deadline = time.monotonic() + 600
    with open_terminal(command, rows=31, columns=97) as terminal:
        terminal.screen.expect("# ", timeout=180)
        # ctr tells the size after the start
        terminal.screen.send("test -t 0 && until stty size | grep -q '31 97'; do sleep 0.2; done; echo si''zed\n")
        terminal.screen.expect("sized")
        terminal.resize(40, 111)
        terminal.screen.send("until stty size | grep -q '40 111'; do sleep 0.2; done; echo re''sized\n")
        # ctr listens for the signal a moment after it has told the first size
        while terminal.screen.expect(["resized", pexpect.TIMEOUT], timeout=1):
            assert time.monotonic() < deadline, "the new size is not told"
            os.kill(terminal.process.pid, signal.SIGWINCH)
        terminal.screen.send("trap 'echo inter''rupted' INT; echo lis''tens; sleep 1000\n")
        terminal.screen.expect("listens")
        wait_for(lambda: "sleep 1000" in last_process(ctr, container), "the program in front")
        terminal.screen.send("\x03")
        terminal.screen.expect("interrupted")
        terminal.screen.send("exit 9\n")
        assert terminal.wait(180) == 9


def last_process(ctr: Containerd, container: str) -> str:
    """The newest sleep that the container has beside its first process, or nothing."""
    lines = inside(ctr, container, "ps -o pid,args").stdout.splitlines()
    return "\n".join(line for line in lines if line.split()[0] != "1")


def test_run_with_a_terminal(ctr: Containerd, runtime: str) -> None:
    command = ctr.command("run", "--rm", "-t", "--runtime", runtime, BUSYBOX, ctr.new_id(), "sh")
    with open_terminal(command) as terminal:
        terminal.screen.expect("# ", timeout=180)
        terminal.screen.send("tty; exit 4\n")
        terminal.screen.expect("/dev/(pts/0|console)")
        assert terminal.wait(180) == 4


@pytest.mark.parametrize(("signal", "code"), [("SIGKILL", 137), ("SIGTERM", 143), ("SIGUSR1", 138)])
def test_signals(ctr: Containerd, runtime: str, signal: str, code: int) -> None:
    """One that the first process leaves at its default reaches a process below it."""
    body = "sleep 1000 & echo $! > /tmp/pid; wait $!; exit $?"
    if signal != "SIGKILL":
        body = f"trap 'exit {code}' {signal.removeprefix('SIG')}; {body}"
    container = start(ctr, runtime, "sh", "-c", body)
    wait_for(lambda: inside(ctr, container, "test -s /tmp/pid").code == 0, "the process below is there")
    ctr.ok("tasks", "kill", "--signal", signal, container)
    wait_for(lambda: ctr.tasks()[container] == "STOPPED", "the task is stopped")
    assert ctr.delete(container) == code


def test_pause_and_resume(ctr: Containerd, runtime: str) -> None:
    container = start(ctr, runtime, "sh", "-c", "while :; do echo x >> /tmp/beats; sleep 0.05; done")
    ctr.ok("tasks", "pause", container)
    assert ctr.tasks() == {container: "PAUSED"}
    ctr.ok("tasks", "resume", container)
    assert ctr.tasks() == {container: "RUNNING"}
    first = beat(ctr, container)
    wait_for(lambda: beat(ctr, container) > first, "the heart beats again")


def beat(ctr: Containerd, container: str) -> int:
    return len(inside(ctr, container, "cat /tmp/beats").stdout)


def test_paused_does_not_run(ctr: Containerd, runtime: str, tmp_path: Path) -> None:
    """The file that it writes, seen from outside, stays as it is."""
    mount = f"type=bind,src={tmp_path},dst=/mnt,options=rbind:rw"
    body = "while :; do echo x >> /mnt/beats; sleep 0.05; done"
    container = start(ctr, runtime, "sh", "-c", body, flags=("--mount", mount))
    beats = tmp_path / "beats"
    wait_for(lambda: beats.stat().st_size > 4, "it beats")
    ctr.ok("tasks", "pause", container)
    held = beats.stat().st_size
    for _ in range(20):  # a second's worth of beats
        wait_for(lambda: True, "a moment")
        ctr.tasks()
    assert beats.stat().st_size == held
    ctr.ok("tasks", "resume", container)
    wait_for(lambda: beats.stat().st_size > held, "it beats again")


def test_processes_and_metrics(ctr: Containerd, runtime: str, tmp_path: Path) -> None:
    container = start(ctr, runtime, "sh", "-c", "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done; exec sleep 1000")
    fifos = ("--fifo-dir", str(tmp_path))  # which ctr leaves behind where a detached exec ends with its container
    ctr.ok("tasks", "exec", "--detach", *fifos, "--exec-id", "e1", container, "sh", "-c", "sleep 1000 & wait")
    wait_for(lambda: len(ctr.ok("tasks", "ps", container).splitlines()) == 4, "all three processes are listed")
    head, *rows = ctr.ok("tasks", "ps", container).splitlines()
    assert head.split() == ["PID", "INFO"]
    assert len({int(row.split()[0]) for row in rows}) == 3
    assert ["e1" in row for row in rows].count(True) == 1
    wait_for(lambda: cpu_and_memory(ctr, container)[0] > 0, "CPU time is counted")
    assert cpu_and_memory(ctr, container)[1] > 0


def cpu_and_memory(ctr: Containerd, container: str) -> tuple[int, int]:
    """Nanoseconds of CPU and bytes, whichever version of cgroups they come in."""
    found = json.loads(ctr.ok("tasks", "metrics", "--format", "json", container))
    cpu, memory = found["cpu"], found["memory"]
    if "usage_usec" in cpu:
        return cpu["usage_usec"] * 1000, memory["usage"]
    return cpu["usage"]["total"], memory["usage"]["usage"]


def test_delete_of_a_running_task(ctr: Containerd, runtime: str) -> None:
    container = start(ctr, runtime, "sleep", "1000")
    refused = ctr("tasks", "delete", container)
    assert refused.code != 0
    assert ctr.tasks() == {container: "RUNNING"}
    ctr("tasks", "delete", "--force", container)  # its status is that of the process, which was killed
    assert ctr.tasks() == {}


def test_what_is_not_there(ctr: Containerd, runtime: str) -> None:
    container = start(ctr, runtime, "sleep", "1000")
    for command in (["kill", "no-such-task"], ["pause", "no-such-task"], ["metrics", "no-such-task"]):
        result = ctr("tasks", *command)
        assert result.code != 0
        assert "no-such-task" in result.stderr
    again = ctr("run", "--detach", "--runtime", runtime, BUSYBOX, container, "true")
    assert "already exists" in again.stderr
    assert ctr.tasks() == {container: "RUNNING"}
