"""A container without limits that takes all that its guest has: the guest's own parts go on, and so does what people do
about it."""

import json
import re
from pathlib import Path

import pytest

from kit.containerd import CONSOLE_CONFIG
from kit.kata import Kata, wait_for

pytestmark = [pytest.mark.core, pytest.mark.timeout(2400)]

BOMB = "trap '' CHLD; b() { b | b & }; b; exec sleep 77777"
"""The one that everybody knows; busybox has no function of the name `:`. The first process ignores SIGCHLD, so that
none that have ended remain."""

LIMIT_S = 600.0  # a thousand processes that all run share one CPU with others of the host
PROCESSES_MIN = 500  # a guest of 256 MiB has room for a thousand


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a small VM with a debug console."""
    path = tmp_path_factory.mktemp("bomb") / "configuration.toml"
    path.write_text(f"{CONSOLE_CONFIG}\n[hypervisor.qemu]\ndefault_memory = 256\n")
    return path


def processes(kata: Kata, name: str) -> int:
    """Of the container, as the agent counts them."""
    (row,) = json.loads(kata.ok("stats", "--json", name))
    return int(row["pids"])


def start(kata: Kata, config: Path, *command: str) -> str:
    name = kata.name()
    kata._started.append(name)
    kata.ok("--config", str(config), "run", "-d", "--net", "none", "--name", name, "busybox", *command)
    return name


def test_whoever_looks_after_a_fork_bomb_can(kata: Kata, config: Path) -> None:
    box = start(kata, config, "sh", "-c", BOMB)
    wait_for(lambda: processes(kata, box) > PROCESSES_MIN, "the processes multiply", LIMIT_S)
    refused = "fork rejected by pids controller"
    wait_for(lambda: refused in kata.ok("exec", "--vm", box, "dmesg"), "they are as many as there may be", LIMIT_S)

    code, out, err = kata("exec", box, "cat", "/proc/1/comm", timeout=LIMIT_S)
    assert (code, out) == (0, "sleep\n") or re.search(
        r"have \d+ processes and threads, and its guest has room for", err
    )
    assert kata.ok("exec", "--vm", box, "echo", "the console too") == "the console too\n"
    assert kata.listed(box)["state"] == "running"
    kata.ok("kill", box)
    wait_for(lambda: kata.listed(box)["state"] == "stopped", "it ends")
    kata.ok("delete", box)


def test_a_fork_bomb_is_deleted(kata: Kata, config: Path) -> None:
    box = start(kata, config, "sh", "-c", BOMB)
    wait_for(lambda: processes(kata, box) > PROCESSES_MIN, "the processes multiply", LIMIT_S)
    kata.ok("delete", "--force", box)


def test_all_memory(kata: Kata, config: Path) -> None:
    """What takes it is killed, by the limit of all containers: the agent and its files are not what has to go."""
    box = start(kata, config, "sleep", "77777")
    assert kata("exec", box, "tail", "/dev/zero").code == 137
    said = kata.ok("exec", "--vm", box, "dmesg")
    assert re.search(r"oom-kill:constraint=CONSTRAINT_MEMCG.*oom_memcg=/containers,", said)
    assert kata.ok("exec", box, "echo", "still here") == "still here\n"
