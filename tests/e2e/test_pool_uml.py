"""A pool with machines of User-mode Linux, whatever this run's accelerator is: they do not grow, have a cgroup, and get
their network by mconsole (test_run_network.py has a start with one). test_pool.py has what all machines have."""

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from katapod.host.cgroup import host_hierarchies
from kit.accel import VARIABLE
from kit.kata import Kata, Result
from kit.pool import Pool, left_of, shared_pool, supervisor_of, used_by
from kit.uml_image import needs_uml_image

pytestmark = [needs_uml_image, pytest.mark.timeout(1800)]

MEM_TOTAL = re.compile(r"MemTotal: +(\d+) kB")


@pytest.fixture(autouse=True)
def _uml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "uml")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "uml")
        with shared_pool(tmp_path_factory.mktemp("uml"), 1) as found:
            yield found


@pytest.fixture
def pool(kata: Kata, server: Pool) -> Iterator[Pool]:
    """One machine, in a pool that tests share."""
    with used_by(kata, server) as found:
        yield found


def memory_kib(result: Result) -> int:
    found = MEM_TOTAL.match(result.stdout)
    assert found is not None
    return int(found[1])


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


def test_factory_says_what_is_true(pool: Pool, kata: Kata, tmp_path: Path) -> None:
    (kernel,) = pool.wait_full()
    status = pool.status()
    assert status is not None
    assert pool("factory", "status").stdout.splitlines()[:3] == [
        f"VM cache server pid = {status['pid']}",
        f"VM pid = {kernel} Cpu = 1 Memory = 2048MiB",
        "no template is needed with User-mode Linux: the pool keeps 1 machine ready",
    ]
    config = tmp_path / "none.toml"
    config.write_text("[factory]\nenable_template = true\n")
    refused = kata("--config", str(config), "factory", "init")
    assert (refused.code, refused.stdout) == (1, "")
    assert "User-mode Linux: it has no templates" in refused.stderr


def test_files_of_a_container_that_took_a_machine_stay(pool: Pool) -> None:
    """It is started again in a machine of its own."""
    pool.wait_full()
    name = pool.kata.remove_later(pool.kata.name())
    first = pool.taking("run", "--name", name, "busybox", "sh", "-c", "echo x >> /n; cat /n")
    assert (first.code, first.stdout) == (0, "x\n")
    assert pool.kata("start", "-a", name).stdout == "x\nx\n"
    assert pool.kata("start", "-a", name).stdout == "x\nx\nx\n"
