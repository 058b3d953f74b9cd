"""Containers that stay: create, start, restart, their files, deaths at each step, and restart policies."""

import os
import signal
import time
from pathlib import Path

import pytest
from faults import die_hard, record_of, vmm_of, wait_until

from kit.kata import Kata, wait_for

COUNT = 'n=$(($(cat /n 2>/dev/null || echo 0) + 1)); echo $n > /n; echo "run $n"; exit $((n + 2))'


def made(kata: Kata, *words: str) -> str:
    """`create --name NEW WORDS`, removed at the end."""
    name = kata.name()
    kata.remove_later(name)
    assert kata.ok("create", "--name", name, *words) == f"{name}\n"
    return name


def has_ended(kata: Kata, name: str) -> bool:
    return str(kata.listed(name)["state"]) == "stopped"


@pytest.mark.core
def test_files_stay_from_start_to_start(kata: Kata, tmp_path: Path) -> None:
    """Also where the image's name has come to mean another one, and the caller's environment has changed."""
    cid = tmp_path / "cid"
    name = made(kata, "-e", "A=1", "--cidfile", str(cid), "busybox", "sh", "-c", f"echo $A; {COUNT}")
    assert cid.read_text() == name
    assert kata.listed(name)["status"] == "created"
    assert not vmm_of(name)
    assert kata("exec", name, "true").code == 125
    first = kata("start", "-a", name)
    assert (first.code, first.stdout, first.stderr) == (3, "1\nrun 1\n", "")
    assert kata.ok("start", name) == f"{name}\n"
    assert kata.ok("wait", name) == "4\n"
    assert kata.ok("restart", name) == f"{name}\n"
    assert kata.ok("wait", name) == "5\n"
    assert kata.ok("logs", name) == "1\nrun 1\n1\nrun 2\n1\nrun 3\n"
    assert kata.ok("inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", name) == "exited 5\n"
    told = kata.ok("events", "--since", "1h", "--until", "0s", "-f", f"container={name}", "--format", "{{.Action}}")
    assert told.split() == ["create", *["start", "die"] * 2, "restart", "start", "die"] or told.split() == [
        *("create", *["start", "die"] * 2, "start", "restart", "die")
    ]
    taken = kata("create", "--name", name, "busybox")
    assert (taken.code, "the name is taken" in taken.stderr) == (1, True)
    new = kata.remove_later(kata.name())
    assert kata.ok("rename", name, new) == ""
    assert kata("start", name).code == 1
    assert kata("start", "-a", new).stdout == "1\nrun 4\n"
    kata.ok("delete", new)


def test_a_container_of_run_starts_again_as_it_was(kata: Kata) -> None:
    """With its volume and its limits; while it runs a further start is none, and restart ends it first."""
    script = "echo $((1 + $(cat /d/n 2>/dev/null || echo 0))) > /d/n; echo x >> /own; touch /ready; sleep 1000"
    name = kata.start("-v", "/d", "-m", "64m", "--stop-timeout", "0", "busybox", "sh", "-c", script)

    def ready() -> bool:
        return kata("exec", name, "test", "-e", "/ready").code == 0

    wait_for(ready, "it runs")
    assert kata.ok("start", name) == f"{name}\n"
    limit = kata.ok("exec", name, "cat", "/sys/fs/cgroup/memory.max")
    assert kata.ok("exec", name, "rm", "/ready") == ""
    assert kata.ok("restart", "-t", "0", name) == f"{name}\n"
    wait_for(ready, "it runs again")
    assert kata.ok("exec", name, "cat", "/d/n", "/own") == "2\nx\nx\n"
    assert kata.ok("exec", name, "cat", "/sys/fs/cgroup/memory.max") == limit
    kata.ok("stop", name)
    kata.ok("delete", "-v", name)


def test_a_directory_as_the_image(kata: Kata, tmp_path: Path) -> None:
    """Its root is in the shared directory; the image's own files stay as they are."""
    for name in ("bin", "proc", "sys", "dev", "etc"):
        (tmp_path / name).mkdir()
    (tmp_path / "bin/busybox").write_bytes(Path("/bin/busybox").read_bytes())
    (tmp_path / "bin/busybox").chmod(0o755)
    (tmp_path / "bin/sh").symlink_to("busybox")
    script = "test -e /mark && /bin/busybox cat /mark; echo kept > /mark; /bin/busybox chmod 700 /"
    name = made(kata, "--rootfs", str(tmp_path), "/bin/sh", "-c", script)
    assert kata("start", "-a", name).stdout == ""
    assert kata("start", "-a", name).stdout == "kept\n"
    upper = Path(f"/var/lib/katapod/sandboxes/{name}/files/upper")
    assert upper.stat().st_mode & 0o777 == 0o700
    assert not (tmp_path / "mark").exists()


@pytest.mark.core
def test_files_survive_a_supervisor_that_is_killed(kata: Kata) -> None:
    script = "if test -e /mark; then cat /mark; else echo kept > /mark; sync; touch /ready; sleep 1000; fi"
    name = kata.start("busybox", "sh", "-c", script)
    wait_for(lambda: kata("exec", name, "test", "-e", "/ready").code == 0, "it has written")
    supervisor = record_of(name)["supervisor_pid"]
    assert isinstance(supervisor, int)
    os.kill(supervisor, signal.SIGKILL)
    gone = ("dead", "stopped")  # another run may have cleaned up after it
    wait_for(lambda: kata.listed(name)["state"] in gone, "its supervisor is gone")
    again = kata("start", "-a", name)
    assert (again.code, again.stdout) == (0, "kept\n"), again


@pytest.mark.parametrize("moment", ["claimed", "vmm-started", "running"])
def test_a_start_that_is_killed_can_be_repeated(kata: Kata, moment: str) -> None:
    name = made(kata, "busybox", "sh", "-c", "echo x >> /n; cat /n; until test -e /end; do sleep 0.1; done")
    with kata.spawn("start", "-a", name, stdout=-1, stderr=-1) as starting:
        look = {
            "claimed": lambda: record_of(name).get("state") != "created",
            "vmm-started": lambda: vmm_of(name),
            "running": lambda: kata("exec", name, "test", "-e", "/n").code == 0,
        }[moment]
        wait_until(moment, look, period_s=0.001)
        die_hard(starting.pid)
        starting.communicate()
    wait_for(lambda: not vmm_of(name), "its VM is gone")
    assert kata.ok("start", name) == f"{name}\n"
    wait_for(lambda: kata.ok("logs", name).endswith("x\n"), "it runs")
    kata.let_end(name, "/end")
    assert kata.ok("wait", name) == "0\n"


def test_a_start_that_fails_leaves_the_container(kata: Kata, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    name = made(kata, "-v", f"{source}:/d", "busybox", "sh", "-c", COUNT)
    source.rmdir()
    failed = kata("start", name)
    assert (failed.code, "no such file or directory on this host" in failed.stderr) == (1, True)
    assert kata.listed(name)["status"] == "created"
    source.mkdir()
    assert kata("start", "-a", name).code == 3
    source.rmdir()
    assert kata("start", name).code == 1
    assert kata.ok("inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", name) == "exited 3\n"
    assert "no such file or directory on this host" in kata.listed(name)["error"]
    source.mkdir()
    assert kata("start", "-a", name).code == 4


def test_what_create_cannot_make_is_not_there(kata: Kata) -> None:
    name = kata.name()
    for words, told in (
        (("none-such:1",), "cannot find image"),
        (("-v", "/none/such:/d", "busybox"), "no such file or directory"),
        (("--restart", "always", "--rm", "busybox"), "with --rm"),
    ):
        failed = kata("create", "--name", name, *words)
        assert (failed.code, told in failed.stderr) == (1, True), failed
        assert not Path(f"/run/vc/sbs/{name}").exists()
        assert not Path(f"/var/lib/katapod/sandboxes/{name}").exists()


def test_what_is_removed_at_its_first_end(kata: Kata) -> None:
    name = made(kata, "--rm", "busybox", "sh", "-c", "exit 7")
    assert kata.ok("stop", name) == f"{name}\n"
    assert kata.listed(name)["status"] == "created"
    assert kata("start", "-a", name).code == 7
    assert kata("inspect", name).code == 1


def test_a_policy_starts_what_fails_so_many_times(kata: Kata) -> None:
    name = kata.start("--restart", "on-failure:2", "busybox", "sh", "-c", "echo x >> /n; wc -l < /n; exit 1")
    # it has stopped twice before, too: for the moment until its policy is asked
    wait_for(lambda: kata.listed(name)["restarts"] == 2 and has_ended(kata, name), "its policy has given up")
    assert kata.ok("logs", name) == "1\n2\n3\n"
    assert (kata.listed(name)["restarts"], kata.listed(name)["restart_policy"]) == (2, "on-failure:2")
    well = kata("run", "--name", kata.remove_later(kata.name()), "--restart", "on-failure", "busybox", "true")
    assert (well.code, well.stderr) == (0, "")


def test_a_policy_in_the_foreground(kata: Kata) -> None:
    name = kata.remove_later(kata.name())
    done = kata("run", "--name", name, "--restart", "on-failure:1", "busybox", "sh", "-c", COUNT)
    assert (done.code, done.stdout) == (4, "run 1\nrun 2\n")


def test_stop_is_the_end_whatever_the_policy(kata: Kata) -> None:
    """Of one that runs, and of one that is waiting to be started again or is being started."""
    runs = kata.start("--restart", "always", "--stop-timeout", "0", "busybox", "sleep", "1000")
    fails = kata.start("--restart", "unless-stopped", "busybox", "false")
    wait_for(lambda: float(str(record_of(fails).get("restart_at", 0))) > time.time() + 1.5, "it waits for long")
    assert kata.ok("start", fails) == f"{fails}\n"
    assert kata.ok("stop", runs, fails) == f"{runs}\n{fails}\n"
    for name in (runs, fails):
        assert kata.listed(name)["state"] == "stopped"
        assert record_of(name)["stop_asked"]
        kata.ok("delete", name)
    again = kata.start("--restart", "always", "busybox", "sh", "-c", f"{COUNT}; sleep 1000".replace("exit", ": "))
    wait_for(lambda: kata.ok("logs", again) == "run 1\n", "it runs")
    pid = kata.listed(again)["vmm_pid"]
    os.kill(pid, signal.SIGKILL)  # its VM has died: nobody has asked for that
    # in between, logs says of what it has died
    wait_for(lambda: kata("logs", again).stdout.count("run") == 2, "it was started again")
    assert kata.ok("kill", again) == f"{again}\n"
    wait_for(lambda: has_ended(kata, again), "killed is stopped")
