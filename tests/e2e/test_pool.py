"""The pool: `run` in a machine that was kept ready is the `run` of every other day, only sooner.

What is about machines of User-mode Linux alone is in test_pool_uml.py.
"""

import json
import os
import re
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kit.accel import vmm_name
from kit.jail_probe import assert_jailed
from kit.kata import Kata, Result, wait_for
from kit.pool import (
    KILLED,
    PHASES,
    STATE,
    Pool,
    attached,
    check_killed,
    left_of,
    machine_of,
    machines_of,
    running_pool,
    shared_pool,
    supervisor_of,
    used_by,
)
from kit.template_dirs import TemplateDir
from kit.terminal import open_terminal

pytestmark = pytest.mark.timeout(1800)

MEM_TOTAL = re.compile(rb"MemTotal: +(\d+) kB")
ALL_FLAGS = ("-e", "POOL_TEST", "-e", "OTHER=b c", "-v", "./shared:/v", "--hostname", "other", "--shm-size", "7m")
SEEN_OF_THEM = (
    'echo "$POOL_TEST,$OTHER"; cat /v/file; echo more >> /v/file; umask; hostname; cat /etc/hostname; uname -n; '
    "df -k /dev/shm; nproc; head -n 1 /proc/meminfo; echo layer > /layer; cat /layer"
)
FLAGS = {"flags": ((*ALL_FLAGS, "busybox", "sh", "-c", SEEN_OF_THEM), None)}
CASES = {
    "status": (("-u", "nobody", "-w", "/tmp", "busybox", "sh", "-c", "id -u; pwd; echo err >&2; exit 3"), None),
    "input": (("-i", "busybox", "cat"), bytes(range(256)) * 400),
    "no-input": (("busybox", "cat"), b"unread"),
    "no-command": (("busybox", "no-such-command"), None),
    "no-image": (("no-such-image", "true"), None),
    "no-flag": (("--no-such-flag", "busybox", "true"), None),
}
SIZES = {
    "size": (("-m", "300m", "--cpus", "2", "busybox", "sh", "-c", "nproc; head -n 1 /proc/meminfo"), None),
    "out-of-memory": (("-m", "64m", "busybox", "sh", "-c", "tail -c 200m /dev/zero"), None),
}
Case = tuple[tuple[str, ...], bytes | None]
"""Words of `run`, and its standard input."""


@pytest.fixture(scope="module")
def server_of_two(tmp_path_factory: pytest.TempPathFactory, accelerator: str) -> Iterator[Pool]:
    with shared_pool(tmp_path_factory.mktemp("two"), 2) as found:
        yield found


@pytest.fixture(scope="module")
def server_of_one(tmp_path_factory: pytest.TempPathFactory, accelerator: str) -> Iterator[Pool]:
    with shared_pool(tmp_path_factory.mktemp("one"), 1) as found:
        yield found


@pytest.fixture
def pool(kata: Kata, server_of_two: Pool) -> Iterator[Pool]:
    """Two machines, in a pool that tests share."""
    with used_by(kata, server_of_two) as found:
        yield found


@pytest.fixture
def one(kata: Kata, server_of_one: Pool) -> Iterator[Pool]:
    """The same with a single machine."""
    with used_by(kata, server_of_one) as found:
        yield found


@pytest.mark.core
def test_flags_do_what_they_do_without_the_pool(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POOL_TEST", "a value")
    monkeypatch.chdir(tmp_path)
    check_results(pool, FLAGS)


def test_results_are_those_of_a_start_without_the_pool(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_results(pool, CASES)


@pytest.mark.qemu("its machines grow when they are taken")
def test_sizes_are_those_of_a_start_without_the_pool(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_results(pool, SIZES)


def check_results(pool: Pool, cases: Mapping[str, Case]) -> None:
    """In a directory of the test's own: what is said, and written to a volume."""
    file = Path("shared", "file")
    file.parent.mkdir()
    for what, (args, data) in cases.items():
        name = pool.kata.name()
        file.write_text("content\n")
        without = pool.kata.binary("run", "--rm", "--name", name, *args, input=data)
        file.write_text("content\n")
        before = pool.wait_full()
        within = pool.kata.binary("--config", str(pool.config), "run", "--rm", "--name", name, *args, input=data)
        assert _without_memory(within) == _without_memory(without), what
        assert _memory_kib(within) == pytest.approx(_memory_kib(without), rel=0.03), what
        assert before - pool.vms(), f"{what}: no machine was taken"
        assert file.read_text() == ("content\nmore\n" if what == "flags" else "content\n")


def _without_memory(result: tuple[int, bytes, bytes]) -> tuple[int, bytes, bytes]:
    code, out, err = result
    return code, MEM_TOTAL.sub(b"", out), err


def _memory_kib(result: tuple[int, bytes, bytes]) -> int:
    """What the guest's kernel leaves of its memory: not quite the same for one that was plugged in parts."""
    found = MEM_TOTAL.search(result[1])
    return int(found[1]) if found else 0


@pytest.mark.core
def test_a_detached_container_is_one_like_any_other(pool: Pool) -> None:
    name = pool.kata.name()
    done = pool.taking("run", "-d", "--name", name, "busybox", "sh", "-c", "echo said; exec sleep 1000")
    assert done == (0, f"{name}\n", "")
    machine = machine_of(name)
    assert machine in pool.machines
    assert pool.kata.listed(name)["state"] == "running"
    assert_jailed(pool.kata.listed(name)["vmm_pid"])
    assert [row["name"] for row in json.loads(pool.kata.ok("list", "--json")) if row["name"].startswith("pool-")] == []
    assert pool.kata.ok("exec", name, "hostname") == f"{name}\n"
    wait_for(lambda: pool.kata.ok("logs", name) == "said\n", "the log of the container")
    assert "kata-agent" in (STATE / name / "console.log").read_text(), "the guest's console is the sandbox's by now"
    assert f'"{vmm_name()}"' in pool.kata.ok("inspect", "--json", name)

    conflict = pool("run", "-d", "--name", name, "busybox", "true")
    assert conflict == pool.kata("run", "-d", "--name", name, "busybox", "true")
    assert conflict.code == 125

    assert pool.kata("delete", "--force", name) == (0, f"{name}\n", "")
    assert left_of(name) + left_of(machine) == []


def test_a_terminal_is_passed_on(one: Pool) -> None:
    before = one.wait_full()
    with open_terminal(
        one.command("run", "--rm", "--name", one.kata.name(), "-it", "busybox", "sh"), 33, 101
    ) as terminal:
        screen = terminal.screen
        screen.expect_exact("/ # ")
        screen.send("stty size\r")
        screen.expect(r"\n33 101\r\n")
        terminal.resize(41, 77)
        screen.send("until stty size | grep -q '41 77'; do :; done; echo res''ized\r")
        screen.expect_exact("\nresized\r\n")
        # a program that has the terminal says so itself: the shell would, too, and take the key before it has started
        screen.send("sh -c \"echo wait''ing; exec sleep 100\"\r")
        screen.expect_exact("\nwaiting\r\n")
        screen.send("\x03")
        screen.send("echo after''wards; exit 7\r")
        screen.expect_exact("afterwards\r\n")
        assert terminal.wait() == 7
        assert terminal.settings == terminal.settings_before
    assert before - one.vms()


def test_signals_reach_the_container(one: Pool) -> None:
    name = one.kata.name()
    before = one.wait_full()
    trap = "trap 'echo term; exit 5' TERM; echo ready; while :; do sleep 0.1; done"
    command = one.command("run", "--rm", "--name", name, "busybox", "sh", "-c", trap)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "ready\n"
        client.terminate()
        out, err = client.communicate(timeout=180)
    assert (client.returncode, out, err) == (5, "term\n", "")
    assert before - one.vms()
    assert left_of(name) == []


READ_RANDOM = "head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \\n'; date +' %s'; hostname"


def test_ten_in_a_row_and_no_two_are_alike(one: Pool) -> None:
    names = [one.kata.name() for _ in range(10)]
    check_no_two_are_alike(
        names, [one.taking("run", "--rm", "--name", name, "busybox", "sh", "-c", READ_RANDOM) for name in names]
    )


def check_no_two_are_alike(names: list[str], said: list[Result]) -> None:
    """Of containers that have read random numbers: these and the names are their own, the time is everybody's."""
    assert [(result.code, result.stderr) for result in said] == [(0, "")] * len(names), said
    lines = [result.stdout.split() for result in said]
    streams = {words[0] for words in lines}
    assert len(streams) == len(names)
    assert {len(stream) for stream in streams} == {64}
    now = time.time()
    assert all(now - 600 < float(words[1]) <= now + 1 for words in lines)
    assert [words[2] for words in lines] == names


@pytest.mark.core
def test_more_at_once_than_there_are_machines(pool: Pool) -> None:
    """The third starts one of its own."""
    ready = pool.wait_full()
    users = [os.stat(f"/proc/{vmm}").st_uid for vmm in ready]
    assert len(set(users)) == len(users), "each machine has a user of its own"
    names = [pool.kata.name() for _ in range(3)]

    def start(name: str) -> Result:
        return pool("run", "--rm", "--name", name, "busybox", "sh", "-c", READ_RANDOM)

    with ThreadPoolExecutor(len(names)) as threads:
        check_no_two_are_alike(names, list(threads.map(start, names)))
    assert pool.wait_full().isdisjoint(ready), "both have been taken"


def test_killed_client_takes_its_container_along(one: Pool) -> None:
    name = one.kata.name()
    with attached(one, name) as client:
        machine = machine_of(name)
        client.kill()
        assert client.wait() == -signal.SIGKILL
        wait_for(lambda: left_of(name) + left_of(machine) == [], "nothing is left of the container")
    one.wait_full()


@pytest.mark.core
def test_killed_member_is_said_and_cleaned_up_after(pool: Pool) -> None:
    name = pool.kata.name()
    with attached(pool, name) as client:
        machine = machine_of(name)
        os.kill(supervisor_of(name), signal.SIGKILL)
        _, err = client.communicate(timeout=180)
        assert (client.returncode, err) == (125, KILLED)
        wait_for(lambda: left_of(name) + left_of(machine) == [], "the server has cleaned up")
    pool.wait_full()


@pytest.mark.parametrize("victim", ["client", "member"])
def test_killed_at_any_moment(one: Pool, victim: str) -> None:
    for phase in PHASES:
        check_killed(one, victim, phase)


@pytest.mark.qemu("its machines are given devices while they stand still")
@pytest.mark.parametrize("victim", ["client", "member"])
def test_killed_while_a_machine_is_taken(pool: Pool, victim: str) -> None:
    check_killed(pool, victim, "taken")


@pytest.mark.core
def test_killed_vmm_is_named(pool: Pool) -> None:
    name = pool.kata.name()
    with attached(pool, name) as client:
        os.kill(pool.kata.listed(name)["vmm_pid"], signal.SIGKILL)
        _, err = client.communicate(timeout=180)
        assert client.returncode == 125
        assert f"{vmm_name()} ended unexpectedly: killed by SIGKILL" in err
    assert left_of(name) == []
    pool.wait_full()


def test_a_machine_that_dies_in_the_pool_is_replaced(one: Pool) -> None:
    before = one.wait_full()
    (vmm,) = before
    os.kill(vmm, signal.SIGKILL)
    wait_for(lambda: before.isdisjoint(one.vms()), "the dead one is not offered")
    assert one.wait_full().isdisjoint(before)


def test_what_is_taken_outlives_the_server(kata: Kata, tmp_path: Path) -> None:
    pool = Pool(kata, tmp_path, 1)
    name = kata.name()
    with running_pool(pool) as server:
        (idle,) = pool.wait_full()
        done = pool.taking("run", "-d", "--name", name, "busybox", "sleep", "1000")
        assert done.code == 0
        pool.wait_full()
        server.terminate()
        assert server.wait(180) == 0
    assert Path(f"/proc/{idle}/cmdline").read_bytes() != b"", "its VMM runs"
    machine = machine_of(name)
    assert [left for other in sorted(pool.machines - {machine}) for left in left_of(other)] == []
    assert kata.ok("exec", name, "echo", "alive") == "alive\n"
    again = Pool(kata, tmp_path, 1)
    with running_pool(again):
        again.wait_full()  # nothing of the first server is in the way
    assert kata("delete", "--force", name) == (0, f"{name}\n", "")
    assert left_of(name) + left_of(machine) == []


def test_killed_server_leaves_nothing(kata: Kata, tmp_path: Path) -> None:
    pool = Pool(kata, tmp_path, 2)
    with running_pool(pool) as server:
        pool.wait_full()
        server.kill()
        server.wait(180)
        wait_for(lambda: [left for machine in pool.machines for left in left_of(machine)] == [], "idle ones end")
    assert pool.endpoint.exists(), "a stale socket"
    name = kata.name()
    assert pool("run", "--rm", "--name", name, "busybox", "hostname") == (0, f"{name}\n", ""), "no noise without it"
    with running_pool(pool):
        pool.wait_full()
    assert not pool.endpoint.exists()


def test_server_killed_while_it_starts_a_machine(kata: Kata, tmp_path: Path) -> None:
    pool = Pool(kata, tmp_path, 1)
    with running_pool(pool) as server:
        machines = wait_for(lambda: machines_of(server.pid), "a machine is being started", 180, 0.005)
        server.kill()
        server.wait(180)
        wait_for(lambda: [left for machine in machines for left in left_of(machine)] == [], "it ends")


def test_second_server_is_refused(one: Pool) -> None:
    done = one("factory", "init")
    assert done.code == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"kata-runtime: cannot serve on {one.endpoint}: another server does, process ")
    assert "factory destroy ends it" in done.stderr
    assert len(one.wait_full()) == 1


def test_a_file_that_is_no_socket_is_not_touched(kata: Kata, tmp_path: Path) -> None:
    pool = Pool(kata, tmp_path, 1)
    pool.endpoint.write_text("mine")
    done = pool("factory", "init")
    assert (done.code, done.stdout) == (1, "")
    assert "the file there is not a socket" in done.stderr
    assert pool.endpoint.read_text() == "mine"


@pytest.mark.qemu("User-mode Linux has no templates")
def test_status_and_destroy(kata: Kata, tmp_path: Path, good_template: TemplateDir) -> None:
    """Of a pool with templates of its own: they are gone then."""
    pool = Pool(kata, tmp_path, 1, extra=f'template_path = "{good_template.root}"\n')
    with running_pool(pool) as server:
        (qemu,) = pool.wait_full()
        lines = pool("factory", "status").stdout.splitlines()
        assert lines[0] == f"VM cache server pid = {server.pid}"
        assert lines[1] == f"VM pid = {qemu} Cpu = 1 Memory = 256MiB"
        assert pool("factory", "destroy").stdout.startswith("vm factory destroyed\n")
        assert server.wait(180) == 0
        assert server.stdout is not None
        assert server.stdout.read() == "vm factory initialized\n"
        assert [left for machine in pool.machines for left in left_of(machine)] == []
    assert good_template.keys() == set()


def test_another_configuration_gets_another_machine(kata: Kata, tmp_path: Path) -> None:
    pool = Pool(kata, tmp_path, 1)
    with running_pool(pool):
        check_another_configuration(pool, tmp_path)
    assert [left for machine in sorted(pool.machines) for left in left_of(machine)] == []


def check_another_configuration(one: Pool, tmp_path: Path) -> None:
    before = one.wait_full()
    other = tmp_path / "other.toml"
    tables = (f'[hypervisor.{vmm}]\nkernel_params = "katapod.other=1"\n' for vmm in ("qemu", "uml"))
    other.write_text("".join([one.config.read_text(), *tables]))
    name = one.kata.name()
    command = ("run", "--rm", "--name", name, "busybox", "cat", "/proc/cmdline")
    assert "katapod.other=1" in one.kata.ok("--config", str(other), *command)
    assert one.wait_full() == before, "the machine was none for that configuration"

    replacement = tmp_path / secrets.token_hex(4)
    replacement.write_text(other.read_text())
    os.replace(replacement, one.config)
    assert "katapod.other=1" in one(*command).stdout
    assert one.wait_full().isdisjoint(before), "the server follows its configuration"
    taken = one.taking(*command)
    assert "katapod.other=1" in taken.stdout
