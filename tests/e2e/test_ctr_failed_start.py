"""Starts through containerd that fail, or are broken off: the error names step and cause, nothing is left of them."""

import hashlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import vmm_of, wait_nothing_left, write_config

from kit.containerd import HANDLERS, Containerd
from kit.kata import wait_for
from kit.leaks import claim
from kit.oci_archive import BUSYBOX

INITRD = Path("/var/cache/kata-containers/kata-containers-initrd.img")
KATA = HANDLERS["kata"]
TASKS = "state/io.containerd.runtime.v2.task"
SOCKETS = Path("/run/containerd/s")
SEED = 20_04
MOMENTS = [random.Random(SEED + number).uniform(0.0, 2.5) for number in range(5)]


@pytest.fixture(autouse=True)
def _only_kata(handler: str) -> None:
    if handler != "kata":
        pytest.skip("the steps of a virtual machine's start")


def new_container(ctr: Containerd) -> str:
    """An id, whose socket the leak probe knows."""
    found = ctr.new_id()
    claim(socket_of(ctr, found).name)
    return found


@pytest.fixture
def container(ctr: Containerd) -> str:
    return new_container(ctr)


def socket_of(ctr: Containerd, container: str) -> Path:
    """As containerd has it: a hash of its own address, the namespace and the id."""
    text = f"{ctr.socket}/{ctr.namespace}/{container}"
    return SOCKETS / hashlib.sha256(text.encode()).hexdigest()


def expect_failure(ctr: Containerd, container: str, flags: list[str], *words: str, image: str = BUSYBOX) -> None:
    source = [image] if image else []
    result = ctr("run", "--rm", "--runtime", KATA, *flags, *source, container, *(["true"] if image else []))
    print(result.stderr)
    assert result.code != 0, result
    for word in words:
        assert word in result.stderr, result
    assert "Traceback" not in result.stderr
    assert ctr.tasks() == {}
    wait_nothing_left(container)
    assert not socket_of(ctr, container).exists()


def expect_a_good_start(ctr: Containerd) -> None:
    assert ctr.ok("run", "--rm", "--runtime", KATA, BUSYBOX, ctr.new_id(), "echo", "well") == "well\n"


PARTS: dict[str, list[str]] = {
    "kernel": ["kernel", "/no/such/kernel"],
    "initrd": ["initrd", "/no/such/initrd"],
    "virtio_fs_daemon": ["virtiofsd", "/no/such/virtiofsd"],
    "path": ["/no/such/qemu"],
}


@pytest.mark.qemu("QEMU's settings")
def test_a_part_is_missing_or_damaged(ctr: Containerd, tmp_path: Path) -> None:
    """One failure after the other; and then a start is a start again."""
    without = {"enable_template": False}
    for key, words in PARTS.items():
        config = write_config(tmp_path, qemu={key: words[-1]}, factory=without)
        expect_failure(ctr, new_container(ctr), ["--runtime-config-path", str(config)], *words)
    initrd = tmp_path / "short.img"
    initrd.write_bytes(INITRD.read_bytes()[:1_000_000])
    config = write_config(tmp_path, qemu={"initrd": str(initrd)}, agent={"dial_timeout": 5}, factory=without)
    flags = ["--runtime-config-path", str(config)]
    expect_failure(ctr, new_container(ctr), flags, "the guest does not boot", str(initrd))
    expect_a_good_start(ctr)


def program(folder: Path, name: str, body: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_virtiofsd_that_fails(ctr: Containerd, container: str, tmp_path: Path) -> None:
    path = program(tmp_path, "virtiofsd", "echo this machine is too old >&2; exit 3")
    config = write_config(tmp_path, qemu={"virtio_fs_daemon": str(path)}, factory={"enable_template": False})
    flags = ["--runtime-config-path", str(config)]
    expect_failure(ctr, container, flags, "virtiofsd ended", "exit status 3", "this machine is too old")


def test_configuration_that_is_not_there(ctr: Containerd, container: str) -> None:
    expect_failure(ctr, container, ["--runtime-config-path", "/no/such.toml"], "cannot read /no/such.toml")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--net-host"], ["cannot use the host's network", "--net-host"]),
        (["--with-ns", "network:/run/netns/no-such"], ["/run/netns/no-such"]),
        (["--mount", "type=bind,src=/no/such/dir,dst=/mnt,options=rbind:rw"], ["/no/such/dir"]),
        (["--log-uri", "binary:///no/such/logger"], ["/no/such/logger"]),
        (["--log-uri", "fifo:///no/such/fifo"], ["cannot open the stream", "/no/such/fifo", "No such file"]),
        (["--cwd", "relative"], ["cwd"]),
    ],
    ids=["host-network", "netns", "mount", "logger", "fifo", "cwd"],
)
def test_what_cannot_be_had(ctr: Containerd, container: str, flags: list[str], words: list[str]) -> None:
    expect_failure(ctr, container, flags, *words)
    expect_a_good_start(ctr)


def test_root_file_system_that_is_not_there(ctr: Containerd, container: str) -> None:
    result = ctr("run", "--rm", "--runtime", KATA, "--rootfs", "/no/such/root", container, "true")
    assert result.code != 0
    assert "/no/such/root" in result.stderr
    assert ctr.tasks() == {}
    wait_nothing_left(container)


def test_spec_without_a_command(ctr: Containerd, container: str, tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    process = {"args": [], "cwd": "/", "user": {"uid": 0, "gid": 0}}
    linux = {"namespaces": [{"type": "network"}, {"type": "mount"}]}
    root = {"path": str(tmp_path)}
    spec.write_text(json.dumps({"ociVersion": "1.0.2", "process": process, "root": root, "linux": linux}))
    expect_failure(ctr, container, ["--config", str(spec)], "args", image="")


def test_name_that_is_not_allowed(ctr: Containerd) -> None:
    """containerd lets it pass; it is a folder's name of ours."""
    claim(socket_of(ctr, "template").name)
    result = ctr("run", "--rm", "--runtime", KATA, BUSYBOX, "template", "true")
    assert result.code != 0
    assert "cannot use 'template' as a container name" in result.stderr
    assert ctr.tasks() == {}
    assert not socket_of(ctr, "template").exists()


@pytest.mark.parametrize("moment_s", MOMENTS, ids=lambda moment: f"{moment:.2f}s")
def test_shim_is_asked_to_end_during_a_start(ctr: Containerd, container: str, moment_s: float) -> None:
    pid_file = ctr.run_dir / TASKS / ctr.namespace / container / "shim.pid"
    # without FIFOs: containerd forgets theirs where the shim has gone when it asks for the state
    with ctr.spawn("run", "--rm", "--null-io", "--runtime", KATA, BUSYBOX, container, "sleep", "1000") as process:
        pid = int(wait_for(pid_file.read_text, "the shim has begun", 180, 0.002))
        time.sleep(moment_s)
        os.kill(pid, signal.SIGTERM)
        wait_for(gone(pid), "the shim ends")
        process.wait(180)
    wait_for(lambda: ctr.tasks() == {}, "the task is gone")
    wait_nothing_left(container)
    assert not socket_of(ctr, container).exists()


def test_shim_is_asked_to_end_while_the_guest_hangs(ctr: Containerd, container: str, tmp_path: Path) -> None:
    """It does not wait for the guest's time to be over."""
    pid_file = ctr.run_dir / TASKS / ctr.namespace / container / "shim.pid"
    config = write_config(tmp_path, agent={"dial_timeout": 90}, factory={"enable_template": False})
    flags = ["--runtime", KATA, "--runtime-config-path", str(config)]
    with ctr.spawn("run", "--rm", *flags, BUSYBOX, container, "true", stderr=subprocess.PIPE) as process:
        os.kill(int(wait_for(lambda: vmm_of(container), "the VMM has begun", 180, 0.01)), signal.SIGSTOP)
        pid = int(pid_file.read_text())
        os.kill(pid, signal.SIGTERM)
        wait_for(gone(pid), "the shim ends")
        _, said = process.communicate(timeout=180)
    assert b"its shim is shutting down" in said
    wait_nothing_left(container)
    assert not socket_of(ctr, container).exists()


def gone(pid: int) -> Callable[[], bool]:
    def look() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    return look
