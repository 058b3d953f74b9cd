"""`ctr run` as its users meet it: output, exit status, the flags, limits."""

import subprocess
from pathlib import Path

import pytest

from kit.containerd import Containerd
from kit.kata import wait_for
from kit.oci_archive import BUSYBOX

MIB = 1 << 20


@pytest.mark.core
@pytest.mark.smoke
@pytest.mark.reference
def test_streams_stay_apart_and_status_comes_through(ctr: Containerd, runtime: str) -> None:
    command = ["sh", "-c", "echo to-out; echo to-err >&2; exit 7"]
    assert ctr("run", "--rm", "--runtime", runtime, BUSYBOX, ctr.new_id(), *command) == (7, "to-out\n", "to-err\n")
    assert ctr.ok("containers", "list", "--quiet") == ""


@pytest.mark.parametrize(
    ("script", "code"), [("true", 0), ("exit 1", 1), ("no-such-program", 127), ("kill -9 $$", 137)]
)
def test_exit_status(ctr: Containerd, runtime: str, script: str, code: int) -> None:
    """As a shell below the first process has it: that one gets no signal from inside that it does not handle."""
    result = ctr("run", "--rm", "--runtime", runtime, BUSYBOX, ctr.new_id(), "sh", "-c", f"(sh -c '{script}'); exit $?")
    assert result.code == code, result


@pytest.mark.reference
def test_command_not_found(ctr: Containerd, runtime: str) -> None:
    container = ctr.new_id()
    result = ctr("run", "--rm", "--runtime", runtime, BUSYBOX, container, "/no/such/program")
    assert result.code != 0
    assert result.stdout == ""
    assert "/no/such/program" in result.stderr
    assert "no such file" in result.stderr.lower()
    assert ctr.tasks() == {}


def test_stdin_is_piped_until_its_end(ctr: Containerd, runtime: str) -> None:
    text = "".join(f"line {number}\n" for number in range(20_000))
    result = ctr("run", "--rm", "--runtime", runtime, BUSYBOX, ctr.new_id(), "cat", input=text)
    assert result == (0, text, "")


def test_large_output_is_complete(ctr: Containerd, runtime: str) -> None:
    count = 4_000_000
    result = ctr("run", "--rm", "--runtime", runtime, BUSYBOX, ctr.new_id(), "sh", "-c", f"yes | head -c {count}")
    assert (result.code, len(result.stdout), set(result.stdout)) == (0, count, {"y", "\n"})


def test_environment_and_directory(ctr: Containerd, runtime: str) -> None:
    flags = ["--env", "GREETING=good day", "--cwd", "/usr/bin"]
    command = ["sh", "-c", 'echo "$GREETING"; pwd']
    assert (
        ctr.ok("run", "--rm", "--runtime", runtime, *flags, BUSYBOX, ctr.new_id(), *command) == "good day\n/usr/bin\n"
    )


@pytest.mark.smoke
@pytest.mark.parametrize("mode", ["rw", "ro"])
def test_bind_mount(ctr: Containerd, runtime: str, tmp_path: Path, mode: str) -> None:
    (tmp_path / "from-host").write_text("seen\n")
    mount = f"type=bind,src={tmp_path},dst=/mnt,options=rbind:{mode}"
    command = ["sh", "-c", "cat /mnt/from-host; echo written > /mnt/from-inside"]
    result = ctr("run", "--rm", "--runtime", runtime, "--mount", mount, BUSYBOX, ctr.new_id(), *command)
    assert result.stdout == "seen\n"
    if mode == "rw":
        assert (result.code, result.stderr) == (0, "")
        assert (tmp_path / "from-inside").read_text() == "written\n"
    else:
        assert result.code != 0
        assert "Read-only file system" in result.stderr
        assert not (tmp_path / "from-inside").exists()


def test_read_only_root(ctr: Containerd, runtime: str) -> None:
    result = ctr("run", "--rm", "--runtime", runtime, "--read-only", BUSYBOX, ctr.new_id(), "touch", "/new")
    assert result.code == 1
    assert "Read-only file system" in result.stderr


def test_within_its_memory_limit(ctr: Containerd, runtime: str) -> None:
    flags = ["--memory-limit", str(128 * MIB)]
    command = ["sh", "-c", "dd if=/dev/zero of=/dev/null bs=32M count=1 2>/dev/null && echo enough"]
    assert ctr.ok("run", "--rm", "--runtime", runtime, *flags, BUSYBOX, ctr.new_id(), *command) == "enough\n"


@pytest.mark.reference
def test_out_of_memory_is_reported(ctr: Containerd, runtime: str) -> None:
    """The container's process is killed, and containerd hears why."""
    container = ctr.new_id()
    with ctr.events() as events:
        flags = ["--memory-limit", str(64 * MIB)]
        # not before the start is over: runc's shim watches for it only then
        command = "until test -e /tmp/go; do sleep 0.1; done; exec tail /dev/zero"
        with ctr.spawn("run", "--runtime", runtime, *flags, BUSYBOX, container, "sh", "-c", command) as running:
            wait_for(lambda: events.of("/tasks/start", container), "the start is told")
            ctr.ok("tasks", "exec", "--exec-id", "go", container, "touch", "/tmp/go")
            assert running.wait(180) == 137
        wait_for(lambda: events.of("/tasks/oom", container), f"an event /tasks/oom in {events.lines}")


def test_two_at_once(ctr: Containerd, runtime: str) -> None:
    """Each waits for the other's word, so they have to run at the same time."""
    command = ["sh", "-c", "echo up; read word; echo got $word"]
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        ctr.spawn("run", "--rm", "--runtime", runtime, BUSYBOX, ctr.new_id(), *command, **options) as first,
        ctr.spawn("run", "--rm", "--runtime", runtime, BUSYBOX, ctr.new_id(), *command, **options) as second,
    ):
        for process in (first, second):
            assert process.stdout is not None
            assert process.stdout.readline() == b"up\n"
        for process, word in ((second, b"one"), (first, b"two")):
            out, _ = process.communicate(word + b"\n", timeout=180)
            assert (process.returncode, out) == (0, b"got " + word + b"\n")
