"""`run` and `exec` as their users meet them first: output, exit status, and the flags of a process."""

import os
import signal
import subprocess
from typing import Any

import pytest

from kit.kata import RUN_PREFIX, Kata


@pytest.fixture(scope="module")
def box(module_kata: Kata) -> str:
    """A container to run things in."""
    return module_kata.start(*("-e", "FROM_RUN=1", "-w", "/srv", "--hostname", "boxhost", "busybox", "sleep", "1000"))


@pytest.mark.core
@pytest.mark.smoke
def test_guest_kernel(kata: Kata, guest_image: dict[str, Any]) -> None:
    assert kata.run("busybox", "uname", "-r") == (0, f"{guest_image['kernel_version']}\n", "")
    assert guest_image["kernel_version"] != os.uname().release


def test_names_of_the_container_itself(kata: Kata, box: str) -> None:
    """localhost and its own host name have addresses, as everywhere."""
    assert kata.ok("exec", box, "cat", "/etc/hostname") == "boxhost\n"
    assert "127.0.0.1\tlocalhost" in kata.ok("exec", box, "cat", "/etc/hosts")
    assert "1 packets received" in kata.ok("exec", box, "ping", "-c", "1", "-q", "boxhost")


@pytest.mark.core
@pytest.mark.smoke
def test_streams_stay_apart_and_status_comes_through(kata: Kata) -> None:
    result = kata.run("busybox", "sh", "-c", "echo to-out; echo to-err >&2; exit 7")
    assert result == (7, "to-out\n", "to-err\n")


def test_command_not_found(kata: Kata) -> None:
    code, out, err = kata.run("busybox", "no-such-command")
    assert (code, out) == (127, "")
    assert err == 'kata-runtime: exec: "no-such-command": executable file not found in $PATH\n'


def test_command_not_executable(kata: Kata) -> None:
    code, out, err = kata.run("-w", "/etc/passwd", "busybox", "true")
    assert (code, out) == (127, "")
    assert err == 'kata-runtime: cannot change to the working directory "/etc/passwd": not a directory\n'
    code, out, err = kata.run("busybox", "/etc/passwd")
    assert (code, out) == (126, "")
    assert err == 'kata-runtime: exec: "/etc/passwd": permission denied\n'


@pytest.mark.core
def test_killed_container_ends_with_137(kata: Kata) -> None:
    """By `kata-runtime kill`, whose default is SIGKILL."""
    name = kata.name()
    command = ["sh", "-c", "echo up; exec sleep 1000"]
    with kata.spawn("run", "--rm", "--name", name, "busybox", *command, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"up\n"
        assert kata("kill", name) == (0, f"{name}\n", "")
        assert running.wait(180) == 137


@pytest.mark.core
@pytest.mark.smoke
@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["true"], (0, "", "")),
        (["sh", "-c", "echo o; echo e >&2; exit 7"], (7, "o\n", "e\n")),
        (["sh", "-c", "kill -9 $$"], (137, "", "")),
        (["sh", "-c", "kill -TERM $$"], (143, "", "")),
        (["sh", "-c", "exit 255"], (255, "", "")),
    ],
)
def test_exec_status(kata: Kata, box: str, command: list[str], expected: tuple[int, str, str]) -> None:
    assert kata("exec", box, *command) == expected


def test_exec_of_what_cannot_run(kata: Kata, box: str) -> None:
    """In the words that Docker and Podman look for."""
    kata.ok("exec", box, "sh", "-c", "echo nothing > /tmp/text; chmod 755 /tmp/text; mkdir -m 700 /tmp/mine")
    for flags, code, said in (
        (["-w", "/", box, "no-such-command"], 127, 'exec: "no-such-command": executable file not found in $PATH'),
        ([box, "/no/such"], 127, 'exec: "/no/such": no such file or directory'),
        ([box, "/etc"], 126, 'exec: "/etc": permission denied'),
        ([box, "/etc/passwd"], 126, 'exec: "/etc/passwd": permission denied'),
        ([box, "/tmp/text"], 126, 'exec: "/tmp/text": exec format error: it is neither a program nor a script'),
        (["-w", "/no/such", box, "true"], 127, 'cannot change to the working directory "/no/such": no such file'),
        (["-w", "/etc/passwd", box, "true"], 127, 'working directory "/etc/passwd": not a directory'),
    ):
        result = kata("exec", *flags)
        assert (result.code, result.stdout) == (code, ""), flags
        assert said in result.stderr, flags


def test_exec_takes_over_environment_and_directory(kata: Kata, box: str) -> None:
    out = kata.ok("exec", box, "sh", "-c", "echo $FROM_RUN; pwd; hostname; id -u")
    assert out.splitlines() == ["1", "/srv", "boxhost", "0"]


def test_exec_flags(kata: Kata, box: str) -> None:
    script = "echo $FROM_RUN $MORE; pwd; id -u; id -g"
    out = kata.ok("exec", "-e", "MORE=a b", "-w", "/tmp", "-u", "5:60", box, "sh", "-c", script)
    assert out.splitlines() == ["1 a b", "/tmp", "5", "60"]


def test_exec_as_unknown_user(kata: Kata, box: str) -> None:
    code, out, err = kata("exec", "-u", "nobody-here", box, "id")
    assert (code, out) == (125, "")
    assert "nobody-here" in err


@pytest.mark.core
@pytest.mark.smoke
def test_exec_stdin(kata: Kata, box: str) -> None:
    """With -i it is passed on to its end; without, the command finds it empty."""
    assert kata("exec", "-i", box, "sh", "-c", "cat; echo end", input="a\0b\n") == (0, "a\0b\nend\n", "")
    assert kata("exec", box, "sh", "-c", "cat; echo end", input="not passed on") == (0, "end\n", "")


@pytest.mark.core
def test_signal_to_exec_is_passed_on(kata: Kata, box: str) -> None:
    script = "trap 'echo got; exit 9' TERM; echo ready; while :; do sleep 0.1; done"
    with kata.spawn("exec", box, "sh", "-c", script, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"ready\n"
        running.send_signal(signal.SIGTERM)
        assert running.stdout.read() == b"got\n"
        assert running.wait(180) == 9


def test_environment_by_default(kata: Kata, box: str) -> None:
    """What Docker gives: PATH, HOSTNAME, HOME, and not a thing of the caller's."""
    assert set(kata.ok("exec", box, "cat", "/proc/1/environ").rstrip("\0").split("\0")) == {
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOSTNAME=boxhost",
        "HOME=/root",
        "FROM_RUN=1",
    }


@pytest.mark.core
def test_process_flags(kata: Kata, monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once; the working directory does not exist before."""
    monkeypatch.setenv("FROM_CALLER", "of the caller")
    script = (
        "echo $GIVEN; echo $FROM_CALLER; pwd; id -u; id -g; hostname; cat /proc/sys/kernel/hostname;"
        "touch /scratch/x && stat -f -c %T /scratch; df -k /scratch | tail -n 1 | awk '{print $2}'; echo $*"
    )
    code, out, err = kata.run(
        *("-e", "GIVEN=x=1 ü", "-e", "FROM_CALLER", "-w", "/made/for this", "-u", "1000:1001", "--hostname", "named"),
        *("--tmpfs", "/scratch:size=1m,mode=1777", "--entrypoint", "/bin/sh"),
        *("busybox", "-c", script, "zero", "one", "two"),
    )
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[:5] == ["x=1 ü", "of the caller", "/made/for this", "1000", "1001"]
    assert set(lines[5:-3]) == {"named"}
    assert lines[-3:] == ["tmpfs", "1024", "one two"]


def test_user_by_name_on_a_read_only_root(kata: Kata) -> None:
    """An exec is that user too, with the same groups: the primary one is among them."""
    box = kata.start("--read-only", "-u", "nobody", "--group-add", "44", "busybox", "sleep", "1000")
    script = (
        "id -un; id -gn; echo $HOME; touch /tmp/x 2>&1; touch /dev/shm/y && echo shm;"
        "for p in 1 self; do grep -E '^(Uid|Groups):' /proc/$p/status; done; id -g"
    )
    user, group, home, touch, shm, *ids, gid = kata.ok("exec", box, "sh", "-c", script).splitlines()
    assert user == "nobody"
    assert [line.split() for line in ids] == [["Uid:", *["65534"] * 4], ["Groups:", "44", gid]] * 2
    assert group in ("nobody", "nogroup")
    assert home not in ("", "/root")
    assert "Read-only file system" in touch
    assert shm == "shm"


def test_unknown_user(kata: Kata) -> None:
    code, out, err = kata.run("-u", "nobody-here", "busybox", "true")
    assert (code, out) == (125, "")
    assert "nobody-here" in err
    assert len(err.splitlines()) <= 2, err


def test_name_is_taken(kata: Kata, box: str) -> None:
    assert box.startswith(RUN_PREFIX)
    code, out, err = kata("run", "--rm", "--name", box, "busybox", "true")
    assert (code, out) == (125, "")
    assert f"cannot create {box}: the name is taken" in err
    assert kata("exec", box, "true").code == 0, "the container that has the name is not touched"
