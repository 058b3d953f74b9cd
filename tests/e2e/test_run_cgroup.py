"""sandbox_cgroup_only with `run`: its processes in a cgroup of the host, which is gone with them, however they end."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from katapod.host.cgroup import host_hierarchies
from kit.kata import Kata, wait_for
from kit.templates import templates_are_on

STATE = Path("/run/vc/sbs")


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "configuration.toml"
    factory = "" if templates_are_on() else "[factory]\nenable_template = false\n"
    path.write_text(f"{factory}[runtime]\nsandbox_cgroup_only = true\n")
    return str(path)


def record_of(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((STATE / name / "persist.json").read_text())
    return record


def groups_of(name: str) -> list[Path]:
    """The sandbox's own groups, in every hierarchy."""
    return [found for each in host_hierarchies() for found in each.mount.rglob(f"kata_{name}")]


def membership(pid: int) -> set[str]:
    return {line.partition(":")[2] for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()}


@pytest.fixture
def started(kata: Kata, config: str) -> Iterator[str]:
    """A container in the background, with its own configuration."""
    name = kata.name()
    assert kata.ok("--config", config, "run", "-d", "--name", name, "busybox", "sleep", "600") == f"{name}\n"
    yield name
    kata("delete", "--force", name)


def check_members(name: str, path: str) -> None:
    record = record_of(name)
    groups = groups_of(name)
    assert groups
    assert {str(group) for group in groups} <= set(record["cgroups"])
    for group in groups:
        assert str(group).endswith(path)
        members = {int(line) for line in (group / "cgroup.procs").read_text().split()}
        assert {record["supervisor_pid"], record["vmm_pid"]} <= members
    limits = [group / file for group in groups for file in ("memory.limit_in_bytes", "memory.max")]
    limits = [file for file in limits if file.exists()]
    assert all(int(file.read_text()) > record["mem_mib"] << 20 for file in limits)


def test_all_processes_are_in_it_until_it_ends(kata: Kata, started: str) -> None:
    check_members(started, f"/vc/kata_{started}")
    assert kata("delete", "--force", started).code == 0
    assert groups_of(started) == []


def test_in_the_foreground_we_go_back_to_where_we_came_from(kata: Kata, config: str) -> None:
    name = kata.name()
    assert kata.ok("--config", config, "run", "--rm", "--name", name, "busybox", "echo", "hello") == "hello\n"
    assert groups_of(name) == []


@pytest.mark.parametrize("how", ["delete", "the next run"])
def test_after_the_supervisor_was_killed(kata: Kata, config: str, started: str, how: str) -> None:
    record = record_of(started)
    assert groups_of(started)
    os.kill(record["supervisor_pid"], signal.SIGKILL)  # any start on this machine may clean up from now on
    wait_for(lambda: not Path(f"/proc/{record['vmm_pid']}").exists(), "the VMM has ended with its supervisor")
    if how == "delete":
        assert kata("delete", "--force", started).code == 0
    else:
        assert kata.run("busybox", "true").code == 0
    assert groups_of(started) == []


@pytest.mark.qemu("no limit by default")
def test_by_default_it_stays_where_it_was_started(kata: Kata) -> None:
    name = kata.start("busybox", "sleep", "600")
    record = record_of(name)
    assert record["cgroups"] == groups_of(name) == []
    assert membership(record["vmm_pid"]) == membership(os.getpid())


def test_a_bundle_says_where(kata: Kata, config: str, tmp_path: Path) -> None:
    root = tmp_path / "rootfs"
    for folder in ("bin", "dev", "proc", "sys", "tmp"):
        (root / folder).mkdir(parents=True)
    (root / "bin/busybox").write_bytes(Path("/bin/busybox").read_bytes())
    (root / "bin/busybox").chmod(0o755)
    name = kata.name()
    spec = {
        "ociVersion": "1.0.2",
        "process": {"args": ["/bin/busybox", "sleep", "600"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
        "root": {"path": "rootfs"},
        "linux": {"cgroupsPath": f"/{name}/c1", "namespaces": [{"type": "pid"}]},
    }
    (tmp_path / "config.json").write_text(json.dumps(spec))
    kata.ok("--config", config, "run", "-d", "--name", name, "--bundle", str(tmp_path))
    try:
        check_members(name, f"/{name}/kata_{name}")
    finally:
        assert kata("delete", "--force", name).code == 0
    assert [each for hierarchy in host_hierarchies() for each in hierarchy.mount.rglob(f"*{name}*")] == []
