"""The OCI command line with bundles by hand: what an engine does with runc, and what it sees of the container."""

import array
import fcntl
import json
import os
import signal
import subprocess
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kit.kata import RUN_PREFIX, wait_for
from kit.oci import LIMIT_S, ConsoleSocket, OciRuntime, oci_runtime, reap
from kit.templates import kata_command

LOOP = "trap 'echo got TERM; exit 3' TERM; echo ready; while :; do sleep 0.05; done"


@pytest.fixture(scope="module")
def oci() -> Iterator[OciRuntime]:
    with oci_runtime() as runtime:
        yield runtime


@pytest.mark.core
def test_a_life_as_engines_lead_it(oci: OciRuntime) -> None:
    made = oci.create("sh", "-c", "echo out; echo err >&2; cat; exit 7")
    state = oci.state(made.id)
    assert (state["status"], state["pid"]) == ("created", made.pid)
    oci.ok("start", made.id)
    os.write(made.stdin, b"from stdin")
    oci.close_input(made)
    assert (made.read(), made.read(made.stderr)) == ("out\nfrom stdin", "err\n")
    assert reap(made.pid) == 7
    state = oci.state(made.id)
    assert (state["status"], state["pid"]) == ("stopped", 0)
    assert oci("kill", made.id).err.endswith("container not running\n")
    oci.ok("delete", made.id)
    assert oci("state", made.id).code == 1
    assert not list(oci.root.glob(f"*{made.id}*"))


@pytest.mark.core
def test_execs(oci: OciRuntime, tmp_path: Path) -> None:
    box = oci.start("sleep", "1000")
    assert oci("exec", box.id, "sh", "-c", "echo in exec; exit 5")[:2] == (5, "in exec\n")
    assert oci("exec", box.id, "cat", input="some input").out == "some input"
    assert oci("exec", box.id, "sh", "-c", "kill -9 $$").code == 137
    by_options = ("--cwd", "/tmp", "--env", "A=b", "--user", "5:6", box.id, "sh", "-c", "pwd; echo $A; id -u; id -g")
    assert oci.ok("exec", *by_options) == "/tmp\nb\n5\n6\n"
    process = {"args": ["sh", "-c", "echo detached > /tmp/d; exit 9"], "cwd": "/", "env": ["PATH=/bin"], "user": {}}
    (tmp_path / "process").write_text(json.dumps(process))
    pid_file = tmp_path / "pid"
    oci.ok("exec", "--process", str(tmp_path / "process"), "--detach", "--pid-file", str(pid_file), box.id)
    assert reap(int(pid_file.read_text())) == 9
    assert (oci.rootfs / "tmp/d").read_text() == "detached\n"  # the caller's directory, at once
    missing = oci("exec", box.id, "no-such-program")
    assert (missing.code, "executable file not found in $PATH" in missing.err) == (255, True)
    oci.ok("delete", "--force", box.id)
    assert reap(box.pid) == 137


def test_what_the_proxy_is(oci: OciRuntime) -> None:
    group = f"/{RUN_PREFIX}cg/box"
    box = oci.start("sleep", "1000", linux={"cgroupsPath": group})
    place = Path(f"/proc/{box.pid}")
    assert os.getpgid(box.pid) == box.pid
    assert group in (place / "cgroup").read_text()
    assert os.readlink(place / "ns/net") != os.readlink("/proc/self/ns/net")
    assert sorted(os.listdir(place / "root")) == sorted(os.listdir(oci.rootfs))
    assert [name for name in os.listdir(place / "root/proc") if name.isdigit()] == ["1"]
    assert {os.readlink(entry) for entry in (place / "fd").iterdir()} >= {"/dev/null"}
    assert not any("pipe:" in os.readlink(entry) for entry in (place / "fd").iterdir())
    pss = next(line for line in (place / "smaps_rollup").read_text().splitlines() if line.startswith("Pss:"))
    assert int(pss.split()[1]) < 6 << 10  # KiB
    assert f"{group}/kata_" in Path(f"/proc/{oci.supervisor(box.id)}/cgroup").read_text()
    assert json.loads(oci.ok("ps", "--format", "json", box.id)) == [box.pid]
    oci.ok("delete", "--force", box.id)
    reap(box.pid)


@pytest.mark.core
def test_signals(oci: OciRuntime) -> None:
    box = oci.start("sh", "-c", LOOP)
    box.read_until("ready")
    oci.ok("kill", box.id, "0")
    oci.ok("kill", box.id)  # TERM
    assert "got TERM" in box.read()
    assert reap(box.pid) == 3
    oci.ok("delete", box.id)

    box = oci.start("sh", "-c", LOOP)
    box.read_until("ready")
    os.kill(box.pid, signal.SIGTERM)  # what comes to the proxy reaches the process
    assert reap(box.pid) == 3
    oci.ok("delete", box.id)

    made = oci.create("sleep", "1000")
    oci.ok("kill", made.id, "SIGKILL")
    assert reap(made.pid) == 137
    assert oci("start", made.id).code == 1
    oci.ok("delete", made.id)


def test_states_are_checked(oci: OciRuntime) -> None:
    box = oci.start("sleep", "1000")
    assert "not stopped: running" in oci("delete", box.id).err
    assert "already running" in oci("start", box.id).err
    assert "already exists" in oci("create", "--bundle", str(oci.bundle("true")), box.id).err
    oci.ok("pause", box.id)
    assert oci.state(box.id)["status"] == "paused"
    assert "paused" in oci("exec", box.id, "true").err
    oci.ok("resume", box.id)
    assert "not paused" in oci("resume", box.id).err
    oci.ok("update", "--memory", "256m", "--pids-limit", "50", box.id)
    assert oci.ok("exec", box.id, "cat", "/sys/fs/cgroup/pids.max") == "50\n"
    stats = json.loads(oci.ok("events", "--stats", box.id))
    assert (stats["type"], stats["id"]) == ("stats", box.id)
    assert stats["data"]["memory"]["usage"]["limit"] == 256 << 20
    listed = {each["id"]: each for each in json.loads(oci.ok("list", "--format", "json"))}
    assert listed[box.id]["pid"] == box.pid
    oci.ok("delete", "--force", box.id)
    reap(box.pid)
    oci.ok("delete", "--force", box.id)


def size_of(fd: int, rows: int, columns: int) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, array.array("H", [rows, columns, 0, 0]))


def test_a_terminal(oci: OciRuntime, tmp_path: Path) -> None:
    console = ConsoleSocket(tmp_path / "console")
    name, bundle = oci.name(), oci.bundle("sh", "-c", "stty size; read line; stty size; exit 4", terminal=True)
    options = ("--bundle", str(bundle), "--console-socket", console.path, "--pid-file", str(bundle / "pid"))
    oci.ok("create", *options, name)
    master, pid = console.take(), int((bundle / "pid").read_text())
    try:
        size_of(master, 31, 91)
        oci.ok("start", name)
        assert read_until(master, "31 91")
        size_of(master, 41, 101)

        def has_changed() -> bool:
            return oci.ok("exec", name, "stty", "-F", "/dev/console", "size") == "41 101\n"

        wait_for(has_changed, "the guest's terminal to have the new size")
        os.write(master, b"go\r")
        assert read_until(master, "41 101")
        assert reap(pid) == 4
        with pytest.raises(OSError, match="Input/output"):  # its end is the end of the terminal
            read_until(master, "what nobody writes")
    finally:
        os.close(master)
    oci.ok("delete", name)


def read_until(fd: int, text: str) -> str:
    found = b""
    while text.encode() not in found:
        found += os.read(fd, 4096)
    return found.decode()


def test_a_terminal_of_an_exec(oci: OciRuntime, tmp_path: Path) -> None:
    box = oci.start("sleep", "1000")
    console = ConsoleSocket(tmp_path / "console")
    process: dict[str, Any] = {
        "args": ["sh", "-c", "stty size; read l; echo $l"],
        "cwd": "/",
        "env": ["PATH=/bin"],
        "user": {},
    }
    process |= {"terminal": True, "consoleSize": {"height": 22, "width": 77}}
    (tmp_path / "p").write_text(json.dumps(process))
    options = ("--process", str(tmp_path / "p"), "--console-socket", console.path, "--pid-file", str(tmp_path / "pid"))
    oci.ok("exec", *options, "--detach", box.id)
    master = console.take()
    try:
        assert read_until(master, "22 77")
        os.write(master, b"typed\r")
        assert read_until(master, "typed\r\ntyped")
        assert reap(int((tmp_path / "pid").read_text())) == 0
    finally:
        os.close(master)
    oci.ok("delete", "--force", box.id)
    reap(box.pid)


def test_run_waits_and_removes(oci: OciRuntime) -> None:
    name = oci.name()
    done = oci("run", "--bundle", str(oci.bundle("sh", "-c", "cat; exit 6")), name, input="through")
    assert (done.code, done.out, done.err) == (6, "through", "")
    assert oci("state", name).code == 1
    name = oci.name()
    oci.detach("run", "--detach", "--bundle", str(oci.bundle("sleep", "1000")), name)
    pid = oci.state(name)["pid"]
    assert "not stopped: running" in oci("delete", name).err
    oci.ok("delete", "--force", name)
    reap(pid)


def test_a_create_that_fails_leaves_nothing(oci: OciRuntime) -> None:
    before = sorted(os.listdir(oci.root))
    fails = {"createRuntime": [{"path": "/bin/false"}]}
    cases = (
        (oci.bundle("no-such-program"), "executable file not found in $PATH"),
        (oci.bundle("/tmp"), "permission denied"),
        (oci.bundle("true", root={"path": "/no/such/root"}), "/no/such/root"),
        (oci.bundle("true", hooks=fails), "createRuntime hook /bin/false"),
    )
    for bundle, said in cases:
        done = oci("create", "--bundle", str(bundle), oci.name())
        assert done.code == 1
        assert said in done.err
        assert sorted(os.listdir(oci.root)) == before


def test_hooks_see_the_proxy(oci: OciRuntime) -> None:
    seen = oci.directory / "seen"
    script = oci.directory / "hook"
    script.write_text(f"#!/bin/sh\necho $1 $(cat) >> {seen}\n")
    script.chmod(0o755)
    kinds = ("createRuntime", "poststart", "poststop")
    hooks = {kind: [{"path": str(script), "args": ["hook", kind]}] for kind in kinds}
    made = oci.create("true", hooks=hooks)
    kind, _, text = seen.read_text().strip().partition(" ")
    assert (kind, json.loads(text)["pid"], json.loads(text)["id"]) == ("createRuntime", made.pid, made.id)
    oci.ok("start", made.id)
    assert reap(made.pid) == 0
    oci.ok("delete", made.id)
    assert [line.split()[0] for line in seen.read_text().splitlines()] == list(kinds)


def test_without_root(oci: OciRuntime) -> None:
    """As an ordinary user, and as root of a user namespace that has nothing but its files, as rootless Podman is."""
    bundle = oci.bundle("true")
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    for before in (user, [*user, "unshare", "--user", "--map-root-user"]):
        words = kata_command("--root", f"{oci.directory}/mine", "create", "--bundle", str(bundle), "c1")
        done = subprocess.run([*before, *words], capture_output=True, text=True, timeout=LIMIT_S, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith("kata-runtime: cannot create c1: a virtual machine needs root on the host")
    assert not (oci.directory / "mine").exists()
