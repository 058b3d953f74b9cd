"""The pool with User-mode Linux, whatever this run's accelerator is: its machines do not grow, and get their network by
mconsole (test_run_network.py has a start with one)."""

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from katapod.host.cgroup import host_hierarchies
from kit.kata import Kata, Result, wait_for
from kit.pool import KILLED, PHASES, Pool, attached, check_killed, left_of, machine_of, running_pool, supervisor_of
from kit.uml_image import needs_uml_image

pytestmark = [needs_uml_image, pytest.mark.timeout(1800)]

MEM_TOTAL = re.compile(r"MemTotal: +(\d+) kB")
USUAL = "head -n 1 /proc/meminfo; nproc; hostname; cat /etc/hostname; df -k /dev/shm | tail -n 1"
SELF = "head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \\n'; date +' %s'; hostname"


@pytest.fixture(autouse=True)
def _uml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KATAPOD_ACCELERATOR", "uml")


@pytest.fixture
def pool(kata: Kata, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Pool]:
    """One machine, or as many as the test is parametrized with; at the end nothing of any that was ever seen."""
    found = Pool(kata, tmp_path, getattr(request, "param", 1))
    with running_pool(found):
        found.wait_full()
        yield found
    assert [left for machine in sorted(found.machines) for left in left_of(machine)] == []


def memory_kib(result: Result) -> int:
    found = MEM_TOTAL.match(result.stdout)
    assert found is not None
    return int(found[1])


def user_of(pid: int) -> int:
    return os.stat(f"/proc/{pid}").st_uid


def test_a_start_is_what_it_is_without_the_pool(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "given").write_text("given\n")
    script = f"{USUAL}; cat /v/given; echo made > /v/made; echo x > /layer; cat /layer -; echo err >&2; exit 3"
    name = pool.kata.name()
    flags = ("--rm", "-i", "--name", name, "--shm-size", "7m", "-v", f"{tmp_path}:/v")
    without = pool.kata("run", *flags, "busybox", "sh", "-c", script, input="input\n")
    (tmp_path / "made").unlink()
    within = pool.taking("run", *flags, "busybox", "sh", "-c", script, input="input\n")
    assert MEM_TOTAL.sub("", within.stdout) == MEM_TOTAL.sub("", without.stdout)
    assert memory_kib(within) == pytest.approx(memory_kib(without), rel=0.03)  # of its start a random part is lost
    assert (within.code, within.stderr, (tmp_path / "made").read_text()) == (3, "err\n", "made\n")
    missing = pool.taking("run", "--rm", "--name", name, "busybox", "no-such-command")
    assert missing == pool.kata("run", "--rm", "--name", name, "busybox", "no-such-command")


@pytest.mark.parametrize("pool", [2], indirect=True)
def test_two_at_once_and_no_two_are_alike(pool: Pool) -> None:
    names = [pool.kata.name() for _ in range(4)]
    said, users = [], set()
    for pair in (names[:2], names[2:]):
        users |= {user_of(pid) for pid in pool.wait_full()}
        with ThreadPoolExecutor(2) as threads:
            said += list(
                threads.map(lambda name: pool("run", "--rm", "--name", name, "busybox", "sh", "-c", SELF), pair)
            )
    assert [(result.code, result.stderr) for result in said] == [(0, "")] * 4, said
    lines = [result.stdout.split() for result in said]
    assert [words[2] for words in lines] == names
    assert len({words[0] for words in lines}) == 4
    assert all(len(words[0]) == 64 for words in lines)
    now = time.time()
    assert all(now - 600 < float(words[1]) <= now + 1 for words in lines)
    assert len(users) == 4, "each machine has a user of its own"


def test_another_size_boots_a_machine_of_its_own(pool: Pool) -> None:
    before = pool.wait_full()
    name = pool.kata.name()
    words = ("-m", "300m", "busybox", "head", "-n", "1", "/proc/meminfo")
    done = pool("run", "--rm", "--name", name, *words)
    without = pool.kata("run", "--rm", "--name", name, *words)
    assert (done.code, done.stderr) == (without.code, without.stderr) == (0, "")
    assert memory_kib(done) == pytest.approx(memory_kib(without), rel=0.03)
    assert memory_kib(done) < 1 << 20
    assert pool.wait_full().isdisjoint(before), "the machine that was asked has ended"
    assert left_of(name) == []


def limits_of(kernel: int) -> dict[Path, int]:
    """The memory limits of the groups that are its own."""
    files = [
        group / name
        for each in host_hierarchies()
        for group in each.mount.glob("vc/kata_*")
        for name in ("memory.limit_in_bytes", "memory.max")
        if str(kernel) in (group / "cgroup.procs").read_text().split()
    ]
    return {file.parent: int(file.read_text()) for file in files if file.exists()}


@pytest.mark.skipif(
    not any("memory" in each.controllers for each in host_hierarchies()), reason="needs cgroups that limit memory"
)
def test_its_memory_has_the_limit_of_a_boot_of_its_own(pool: Pool) -> None:
    """From its own boot on, whoever takes it."""
    (kernel,) = pool.wait_full()
    waiting = limits_of(kernel)
    own = pool.kata.start("busybox", "sleep", "1000")
    assert list(waiting.values()) == list(limits_of(pool.kata.listed(own)["vmm_pid"]).values()) != []
    name = pool.kata.name()
    assert pool.taking("run", "-d", "--name", name, "busybox", "sleep", "1000").code == 0
    assert pool.kata.listed(name)["vmm_pid"] == kernel
    assert limits_of(kernel) == waiting
    named = json.loads(pool.kata.ok("inspect", "--json", name))["cgroups"]
    assert {str(group) for group in waiting} <= set(named)
    assert pool.kata("delete", "--force", name).code == 0
    assert not any(group.exists() for group in waiting)


def test_a_killed_member_leaves_no_cgroup(pool: Pool) -> None:
    """Its record names it before it is made, and that of a sandbox when it is taken."""
    pool.wait_full()
    name = pool.kata.name()
    assert pool.taking("run", "-d", "--name", name, "busybox", "sleep", "1000").code == 0
    groups = [Path(each) for each in json.loads(pool.kata.ok("inspect", "--json", name))["cgroups"]]
    os.kill(supervisor_of(name), signal.SIGKILL)
    pool.kata("delete", "--force", name)
    assert not any(group.exists() for group in groups if group.name.startswith("kata_"))


def test_what_is_taken_outlives_the_server_and_is_found(kata: Kata, tmp_path: Path) -> None:
    pool, name = Pool(kata, tmp_path, 1), kata.name()
    with running_pool(pool) as server:
        (kernel,) = pool.wait_full()
        assert pool.taking("run", "-d", "--name", name, "busybox", "sleep", "1000") == (0, f"{name}\n", "")
        server.terminate()
        assert server.wait(180) == 0
    machine = machine_of(name)
    assert machine in pool.machines
    assert user_of(kernel) >= 0x70000000
    assert kata.ok("exec", name, "hostname") == f"{name}\n"
    assert '"User-mode Linux"' in kata.ok("inspect", "--json", name)
    assert kata("delete", "--force", name) == (0, "", "")
    assert left_of(name) + [left for other in sorted(pool.machines) for left in left_of(other)] == []


@pytest.mark.parametrize("victim", ["client", "member"])
def test_killed_at_any_moment(pool: Pool, victim: str) -> None:
    for phase in PHASES:
        check_killed(pool, victim, phase)


def test_killed_kernel_and_member_are_named(pool: Pool) -> None:
    (dead,) = pool.wait_full()
    os.kill(dead, signal.SIGKILL)
    wait_for(lambda: dead not in pool.vms(), "a kernel that died in the pool is not offered")
    assert dead not in pool.wait_full()

    name = pool.kata.name()
    (kernel,) = pool.wait_full()
    with attached(pool, name) as client:
        os.kill(kernel, signal.SIGKILL)
        _, err = client.communicate(timeout=180)
        assert client.returncode == 125
        assert "User-mode Linux ended unexpectedly: killed by SIGKILL" in err
    assert left_of(name) == []

    pool.wait_full()
    with attached(pool, name) as client:
        machine = machine_of(name)
        os.kill(supervisor_of(name), signal.SIGKILL)
        _, err = client.communicate(timeout=180)
        assert (client.returncode, err) == (125, KILLED)
        wait_for(lambda: left_of(name) + left_of(machine) == [], "the server has cleaned up")
    pool.wait_full()


def test_killed_server_leaves_nothing(kata: Kata, tmp_path: Path) -> None:
    pool = Pool(kata, tmp_path, 1)
    with running_pool(pool) as server:
        pool.wait_full()
        server.kill()
        server.wait(180)
        wait_for(lambda: [left for machine in pool.machines for left in left_of(machine)] == [], "idle ones end")


def test_factory_says_what_is_true(kata: Kata, tmp_path: Path) -> None:
    pool = Pool(kata, tmp_path, 1)
    with running_pool(pool) as server:
        (kernel,) = pool.wait_full()
        assert pool("factory", "status").stdout.splitlines()[:3] == [
            f"VM cache server pid = {server.pid}",
            f"VM pid = {kernel} Cpu = 1 Memory = 2048MiB",
            "no template is needed with User-mode Linux: the pool keeps 1 machine ready",
        ]
    config = tmp_path / "none.toml"
    config.write_text("[factory]\nenable_template = true\n")
    refused = kata("--config", str(config), "factory", "init")
    assert (refused.code, refused.stdout) == (1, "")
    assert "User-mode Linux: it has no templates" in refused.stderr
