"""The commands around a container: list, logs, kill, pause, resume, stats, delete."""

import json
import re
import subprocess
import time
from pathlib import Path

import pytest

from kit.accel import current_accelerator
from kit.jail_probe import assert_jailed
from kit.kata import RUN_PREFIX, Kata, wait_for

BEGAN = time.time()
COUNT = "n=0; while sleep 0.1; do n=$((n+1)); echo $n > /count; done"
TALK = f"echo out-1; echo err-1 >&2; echo out-2; trap 'echo caught; exit 33' TERM; {COUNT}"


@pytest.fixture(scope="module")
def box(module_kata: Kata) -> str:
    return module_kata.start("--label", "role=test", "busybox", "sh", "-c", f"echo started; {COUNT}")


def test_list(kata: Kata, box: str) -> None:
    header, *rows = kata.ok("list").splitlines()
    assert header.split() == ["NAME", "IMAGE", "COMMAND", "STATE", "AGE", "VM", "NETWORK"]
    row = next(row for row in rows if row.startswith(box))
    assert re.search(r"busybox +sh -c .* running +\d+\w +1 vCPU, 2048 MiB, (kvm|uml|tcg)", row), row
    assert box in kata.ok("list", "-q").splitlines()


@pytest.mark.core
def test_list_as_json(kata: Kata, box: str) -> None:
    listed = kata.listed(box)
    assert listed["image"] == "busybox"
    assert listed["command"][:2] == ["sh", "-c"]
    assert (listed["state"], listed["exit_code"], listed["labels"]) == ("running", None, {"role": "test"})
    assert "kata-runtime" in Path(f"/proc/{listed['supervisor_pid']}/cmdline").read_text()
    program = "linux.uml" if current_accelerator() == "uml" else "qemu-system"
    assert program in Path(f"/proc/{listed['vmm_pid']}/cmdline").read_text()
    if current_accelerator() != "uml":
        assert_jailed(listed["vmm_pid"])
    assert BEGAN < listed["created"] < time.time()


def _count(kata: Kata, box: str) -> int:
    """Between its two system calls the counting shell leaves the file empty."""
    return int(wait_for(lambda: kata("exec", box, "cat", "/count").stdout, "it counts"))


@pytest.mark.core
def test_pause_and_resume(kata: Kata, box: str) -> None:
    began, before = time.monotonic(), _count(kata, box)
    assert kata("pause", box) == (0, f"{box}\n", "")
    assert kata.listed(box)["state"] == "paused"
    refused = kata("exec", box, "cat", "/count")
    assert refused.code != 0
    assert "paused" in refused.stderr
    time.sleep(3)
    assert kata("resume", box) == (0, f"{box}\n", "")
    after = _count(kata, box)
    awake_s = time.monotonic() - began - 3
    assert after - before <= 10 * awake_s + 3, "the three seconds have not been counted"
    wait_for(lambda: _count(kata, box) > after, "it goes on to count")
    again = kata("resume", box)
    assert again.code != 0
    assert "running" in again.stderr


def test_stats(kata: Kata, box: str) -> None:
    (sample,) = json.loads(kata.ok("stats", "--json", box))
    assert sample["name"] == box
    assert 0 <= sample["cpu_percent"] <= 110
    assert 100 << 10 < sample["memory_bytes"] < 100 << 20
    assert sample["memory_limit_bytes"] is None
    assert 1 <= sample["pids"] <= 3
    # that long: on a busy machine seconds pass before they are counted; without the stream that the exec waits for
    script = "for i in 1 2 3 4; do sleep 300 >/dev/null 2>&1 & done; echo on; while :; do :; done"
    with kata.spawn("exec", box, "sh", "-c", script, stdout=subprocess.PIPE) as burning:
        assert burning.stdout is not None
        burning.stdout.readline()
        (busy,) = json.loads(kata.ok("stats", "--json", box))
        burning.terminate()
        burning.wait(180)
    assert busy["cpu_percent"] > sample["cpu_percent"] + 5, "others use the CPU too"
    assert 4 <= busy["pids"] - sample["pids"] <= 6, "five more, give or take the counter's own child"
    header, row = kata.ok("stats", "--no-stream", box).splitlines()
    assert header.split() == ["NAME", "CPU", "%", "MEM", "USAGE", "/", "LIMIT", "PIDS"], "as docker's"
    assert row.split()[0] == box


def test_running_container_is_not_deleted(kata: Kata, box: str) -> None:
    refused = kata("delete", box)
    assert refused.code == 1
    assert f"cannot delete {box}: it is running" in refused.stderr
    assert "--force" in refused.stderr
    assert kata.ok("exec", box, "echo", "alive") == "alive\n"


@pytest.mark.core
def test_life_of_a_detached_container(kata: Kata) -> None:
    """Run, follow its log, ask it to end, look at what it left, remove it."""
    name = kata.start("busybox", "sh", "-c", TALK)
    with kata.spawn("logs", "-f", name, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as following:
        wait_for(lambda: kata("logs", name).stdout == "out-1\nout-2\n", "its first lines are in the log")
        assert kata("logs", name) == (0, "out-1\nout-2\n", "err-1\n")
        last = kata("logs", "--tail", "1", name)
        assert last.stdout + last.stderr in ("out-2\n", "err-1\n"), "streams have no order between each other"
        assert kata("logs", "--tail", "0", name) == (0, "", "")
        stamped = r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z out-\d\n){2}"
        assert re.fullmatch(stamped, kata("logs", "--timestamps", name).stdout)
        assert kata("kill", "-s", "TERM", name) == (0, f"{name}\n", "")
        out, err = following.communicate(timeout=180)
        assert (out, err) == (b"out-1\nout-2\ncaught\n", b"err-1\n")
        assert following.returncode == 0
    listed = kata.listed(name)
    assert (listed["state"], listed["status"], listed["exit_code"]) == ("stopped", "stopped (33)", 33)
    assert kata("logs", name).stdout == "out-1\nout-2\ncaught\n"
    for verb in ("exec", "kill", "pause", "stats"):
        refused = kata(verb, name, *(["true"] if verb == "exec" else []))
        assert refused.code != 0, verb
        assert "it is stopped" in refused.stderr, verb
    assert kata("run", "--rm", "--name", name, "busybox", "true").code == 125, "its name is taken until it is deleted"
    assert kata("delete", name) == (0, f"{name}\n", "")
    gone = kata("delete", name)
    assert gone.code == 1
    assert "no such container" in gone.stderr
    assert kata("delete", "--force", name) == (0, "", "")


def test_force_ends_and_deletes(kata: Kata) -> None:
    name = kata.start("busybox", "sleep", "1000")
    assert kata("delete", "--force", name) == (0, f"{name}\n", "")
    assert name not in kata.ok("list", "-q").split()


def test_detached_container_removes_itself(kata: Kata) -> None:
    name = kata.start("--rm", "busybox", "sleep", "1000")
    assert kata("kill", name) == (0, f"{name}\n", "")
    wait_for(lambda: name not in kata.ok("list", "-q").split(), "it is gone")


def test_detached_start_that_fails_says_why(kata: Kata) -> None:
    name = kata.name()
    code, out, err = kata("run", "-d", "--name", name, "busybox", "no-such-command")
    assert (code, out) == (127, "")
    assert "no-such-command" in err
    assert name not in kata.ok("list", "-q").split()


@pytest.mark.parametrize("verb", ["exec", "kill", "pause", "resume", "stats", "logs", "delete"])
def test_unknown_container(kata: Kata, verb: str) -> None:
    result = kata(verb, f"{RUN_PREFIX}nobody", *(["true"] if verb == "exec" else []))
    assert (result.code, result.stdout) == (125 if verb == "exec" else 1, "")
    assert "no such container" in result.stderr
