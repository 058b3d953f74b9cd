"""An exec that the process of the container carries out for its client, beside one that the client does itself."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from katapod.model.layout import Layout
from kit.kata import Kata, wait_for

COMMANDS: tuple[tuple[list[str], list[str], bytes], ...] = (
    (["sh", "-c", "echo out; echo err >&2; exit 7"], [], b""),
    (["cat"], ["-i"], b"some\0bytes" * 10_000),
    (["cat"], [], b"which nobody asks for"),
    (["sh", "-c", "echo $A; pwd; id -u"], ["-e", "A=1", "-w", "/tmp", "-u", "7"], b""),
    (["no-such-command"], [], b""),
    (["true"], ["-w", "/missing"], b""),
    (["true"], ["-u", "nobody-of-that-name"], b""),
    (["true"], ["-e", "=1"], b""),
    (["sh", "-c", "kill -9 $$"], [], b""),
)


@pytest.fixture(scope="module")
def box(module_kata: Kata) -> str:
    return module_kata.start("--network", "none", "busybox", "sleep", "1000")


def socket_of(box: str) -> Path:
    return Layout().sandbox(box).exec_socket


@pytest.fixture
def by_itself(box: str) -> Iterator[None]:
    """Clients find nobody to hand over to."""
    place, aside = socket_of(box), socket_of(box).with_suffix(".aside")
    place.rename(aside)
    yield
    aside.rename(place)


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_both_ways_end_the_same(kata: Kata, box: str, request: pytest.FixtureRequest) -> None:
    supervisor = kata.listed(box)["supervisor_pid"]
    kata.ok("exec", box, "true")  # what the first one loads stays
    before = descriptors(supervisor)  # perhaps with what is just being closed
    handed_over = [kata.binary("exec", *flags, box, *command, input=data) for command, flags, data in COMMANDS]
    wait_for(lambda: descriptors(supervisor) <= before, "its streams are closed")
    request.getfixturevalue("by_itself")
    alone = [kata.binary("exec", *flags, box, *command, input=data) for command, flags, data in COMMANDS]
    assert handed_over == alone
    assert [code for code, _, _ in alone] == [7, 0, 0, 0, 127, 127, 125, 125, 137]


def test_signals_reach_the_command(kata: Kata, box: str) -> None:
    script = "trap 'echo caught; exit 3' TERM; echo up; while :; do sleep 0.05; done"
    with kata.spawn("exec", box, "sh", "-c", script, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"up\n"
        running.send_signal(signal.SIGTERM)
        assert running.communicate(timeout=180) == (b"caught\n", b"")
        assert running.returncode == 3


def test_a_client_that_is_killed_leaves_nothing_open(kata: Kata, box: str) -> None:
    supervisor = kata.listed(box)["supervisor_pid"]
    kata.ok("exec", box, "true")
    before = descriptors(supervisor)
    with kata.spawn("exec", box, "sh", "-c", "echo up; sleep 1000", stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"up\n"
        assert descriptors(supervisor) > before
        running.kill()
    wait_for(lambda: descriptors(supervisor) <= before, "its streams are closed")


def test_the_death_of_the_other_process_is_told(kata: Kata) -> None:
    name = kata.start("--network", "none", "busybox", "sleep", "1000")
    with kata.spawn(
        "exec", name, "sh", "-c", "echo up; sleep 1000", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"up\n"
        os.kill(kata.listed(name)["supervisor_pid"], signal.SIGKILL)
        _, said = running.communicate(timeout=180)
    assert running.returncode == 125
    told = f"kata-runtime: the command in {name} was cut off: the kata-runtime that runs the container was killed\n"
    assert said.decode() == told
