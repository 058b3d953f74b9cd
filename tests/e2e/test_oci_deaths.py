"""Whatever of an OCI container is killed: who waits for it hears of it, and delete leaves nothing."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from katapod.oci.records import SupervisorDir
from kit.kata import wait_for
from kit.oci import OciRuntime, Started, oci_runtime, reap


@pytest.fixture(scope="module")
def oci() -> Iterator[OciRuntime]:
    with oci_runtime() as runtime:
        yield runtime


def vmm_of(oci: OciRuntime, name: str) -> int:
    """By the sandbox's record."""
    sandbox = json.loads((oci.root / name / "state.json").read_text())["sandbox"]
    return int(json.loads(Path(f"/run/vc/sbs/{sandbox}/persist.json").read_text())["vmm_pid"])


def is_gone(oci: OciRuntime, made: Started) -> bool:
    return not [name for name in os.listdir(oci.root) if made.id in name]


@pytest.mark.parametrize("victim", ["supervisor", "vmm", "proxy"])
@pytest.mark.parametrize("started", [True, False])
def test_a_kill(oci: OciRuntime, victim: str, started: bool) -> None:
    made = oci.start("sleep", "1000") if started else oci.create("sleep", "1000")
    pids = {"supervisor": oci.supervisor(made.id), "vmm": vmm_of(oci, made.id), "proxy": made.pid}
    os.kill(pids[victim], signal.SIGKILL)
    assert reap(made.pid) == 137
    wait_for(lambda: oci.state(made.id)["status"] == "stopped", "the state to be stopped")
    assert oci("kill", made.id, "KILL").err.endswith("container not running\n")
    oci.ok("delete", made.id)
    assert is_gone(oci, made)


def test_a_supervisor_that_is_stopped_is_no_obstacle(oci: OciRuntime) -> None:
    made = oci.start("sleep", "1000")
    os.kill(oci.supervisor(made.id), signal.SIGSTOP)
    oci.ok("delete", "--force", made.id)
    assert reap(made.pid) == 137
    assert is_gone(oci, made)


def test_the_death_of_an_execs_proxy_ends_the_exec(oci: OciRuntime, tmp_path: Path) -> None:
    made = oci.start("sleep", "1000")
    oci.detach("exec", "--detach", "--pid-file", str(tmp_path / "pid"), made.id, "sh", "-c", "sleep 999")
    pid = int((tmp_path / "pid").read_text())

    def execs() -> int:
        return oci.ok("ps", made.id).count("\n") - 2

    assert execs() > 0
    os.kill(pid, signal.SIGKILL)
    assert reap(pid) == 137
    wait_for(lambda: execs() == 0, "the process in the guest to end")
    oci.ok("delete", "--force", made.id)
    reap(made.pid)


def test_a_create_that_is_killed_leaves_nothing(oci: OciRuntime) -> None:
    name = oci.name()
    words = oci.command("create", "--bundle", str(oci.bundle("sleep", "1000")), name)
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as create:
        wait_for(lambda: (oci.root / name / "state.json").exists(), "the claim")
        create.kill()
    sandbox = json.loads((oci.root / name / "state.json").read_text())["sandbox"]
    place = SupervisorDir(str(oci.root), sandbox)
    wait_for(lambda: not place.alive(), "the end of its supervisor, if there was one already")
    oci.ok("delete", "--force", name)
    assert not [entry for entry in os.listdir(oci.root) if name in entry]
