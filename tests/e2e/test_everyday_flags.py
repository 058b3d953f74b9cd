"""Options of `docker run` on a real VM: what the container sees of them."""

import json
from pathlib import Path

import pytest

from kit.kata import Kata


def test_mounts_and_identity(kata: Kata, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("of the host\n")
    script = "cat /src/file; touch /src/new; umask; cat /proc/self/oom_score_adj; df /t | tail -1 | grep -c tmpfs"
    done = kata.run(
        *("--mount", f"type=bind,source={tmp_path},target=/src,readonly", "--umask", "0027", "--oom-score-adj", "77"),
        *("--mount", "type=tmpfs,target=/t,tmpfs-size=1m", "busybox", "sh", "-c", script),
    )
    assert done.stdout.splitlines() == ["of the host", "0027", "77", "1"]
    assert "Read-only file system" in done.stderr
    assert not (tmp_path / "new").exists()


def test_an_init_reaps_and_passes_the_status_on(kata: Kata) -> None:
    done = kata.run("--init", "busybox", "sh", "-c", "cat /proc/1/comm; exit 7")
    assert (done.code, done.stdout.strip() != "sh") == (7, True)


def test_named_volumes_outlive_containers(kata: Kata) -> None:
    volume = kata.name()
    try:
        assert kata.run("-v", f"{volume}:/etc", "busybox", "sh", "-c", "ls /etc; echo kept > /etc/new").stdout
        done = kata.run("--mount", f"source={volume},target=/v", "busybox", "sh", "-c", "cat /v/new; ls /v")
        assert done.stdout.splitlines()[0] == "kept"
        assert "passwd" in done.stdout
        name = kata.start("-v", f"{volume}:/v", "busybox", "sleep", "3600")
        refused = kata("volume", "rm", volume)
        assert (refused.code, f"{name} has it" in refused.stderr) == (1, True)
        kata.ok("delete", "--force", name)
    finally:
        assert kata("volume", "rm", volume).code == 0


def test_a_volume_without_a_name_goes_with_its_container(kata: Kata) -> None:
    before = kata.ok("volume", "ls", "-q")
    assert kata.run("-v", "/data", "busybox", "sh", "-c", "echo x > /data/x; cat /data/x").stdout == "x\n"
    assert kata.ok("volume", "ls", "-q") == before


def test_limits(kata: Kata) -> None:
    script = "cat /sys/fs/cgroup/cpu.max /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory.low; nproc"
    done = kata.run(
        *("--cpu-quota", "25000", "--cpu-period", "50000", "-m", "64m", "--memory-swap", "64m"),
        *("--memory-reservation", "32m", "--cpuset-cpus", "0", "busybox", "sh", "-c", script),
    )
    assert done.stdout.split() == ["25000", "50000", str(64 << 20), str(32 << 20), "1"]


def test_devices_of_the_guest(kata: Kata) -> None:
    done = kata.run(
        "--device", "/dev/fuse", "busybox", "sh", "-c", "ls -l /dev/fuse | cut -c1; : < /dev/fuse && echo open"
    )
    assert done.stdout.splitlines() == ["c", "open"], done
    refused = kata.run("--device", "/dev/tty", "busybox", "true")
    assert (refused.code, "no character device of the host" in refused.stderr) == (125, True)


def test_files_of_etc(kata: Kata) -> None:
    script = "cat /etc/resolv.conf; test -e /etc/hosts || echo no hosts; cat /proc/sys/kernel/domainname"
    done = kata.run(
        *("--dns", "192.0.2.1", "--dns-search", "a.example", "--dns-opt", "ndots:2", "--no-hosts"),
        *("--domainname", "nis.example", "busybox", "sh", "-c", script),
    )
    assert done.stdout.splitlines() == [
        "search a.example",
        "options ndots:2",
        "nameserver 192.0.2.1",
        "no hosts",
        "nis.example",
    ]


def test_streams_and_switches(kata: Kata) -> None:
    done = kata.run("-a", "stderr", "--tty=false", "busybox", "sh", "-c", "echo out; echo err >&2")
    assert (done.stdout, done.stderr) == ("", "err\n")


def test_names_files_and_labels(kata: Kata, tmp_path: Path) -> None:
    (tmp_path / "labels").write_text("a=1\nb=2\n")
    name = kata.name()
    words = ["run", "-d", "--name", name, "--replace", "--cidfile", str(tmp_path / "cid")]
    words += ["--label-file", str(tmp_path / "labels"), "-l", "b=3", "--stop-timeout", "0", "--log-opt", "max-size=1m"]
    try:
        assert kata.ok(*words, "busybox", "sleep", "3600") == f"{name}\n"
        assert (tmp_path / "cid").read_text() == name
        assert kata.listed(name)["labels"] == {"a": "1", "b": "3"}
        again = kata(*words, "busybox", "sleep", "3600")
        assert (again.code, "it is there already" in again.stderr) == (125, True)
        (tmp_path / "cid").unlink()
        assert kata.ok(*words, "busybox", "sleep", "3600") == f"{name}\n"  # in place of the first
    finally:
        kata("delete", "--force", name)


def test_no_log(kata: Kata) -> None:
    name = kata.start("--log-driver", "none", "busybox", "sh", "-c", "echo x")
    kata.ok("wait", name)
    assert kata("logs", name).stdout == ""


def test_images(kata: Kata) -> None:
    never = kata.run("--pull", "never", "docker://registry.invalid/none:1", "true")
    assert (never.code, "--pull never forbids" in never.stderr) == (125, True)
    other = kata.run("--platform", "linux/riscv64", "busybox", "true")
    assert (other.code, "has this machine's processor" in other.stderr) == (125, True)
    assert kata.run("-q", "--pull", "missing", "busybox", "echo", "there").stdout == "there\n"


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        ("--gpus all", "devices of the host are not passed through to VMs"),
        ("--pid host", "its processes are in a kernel of their own"),
        ("--ipc host", "its kernel's memory and semaphores are its own"),
        ("--link db", "names of other containers are not resolved"),
        ("--net host", "cannot share the host's network"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(kata: Kata, words: str, cause: str) -> None:
    done = kata.run(*words.split(), "busybox", "true")
    assert (done.code, done.stdout) == (125, "")
    assert cause in done.stderr
    assert "hint: " in done.stderr
    assert len(done.stderr.splitlines()) == 2


def test_lines_of_json(kata: Kata) -> None:
    name = kata.start("busybox", "sleep", "3600")
    rows = [json.loads(line) for line in kata.ok("ps", "--format", "json").splitlines()]
    assert [row["State"] for row in rows if row["Names"] == name] == ["running"]
