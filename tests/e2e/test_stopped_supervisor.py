"""A supervisor that is stopped by a signal: what other processes can do of its sandbox, and how it goes on."""

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from faults import leftovers, record_of

from katapod.host.state import StateStore
from katapod.model.layout import Layout
from katapod.sandbox.recorded import resize_memory, unplug_disk, unplug_nic
from kit.kata import RUN_PREFIX, Kata
from kit.templates import kata_command

pytestmark = pytest.mark.qemu("devices that other processes change")

HOST = f"{RUN_PREFIX}stopped"
STORE = StateStore(Layout())


@pytest.fixture(scope="module", autouse=True)
def _host_of_tests() -> Iterator[None]:
    """A network namespace that plays the host: the bridge is made in there."""
    subprocess.run(["ip", "netns", "add", HOST], check=True)
    try:
        subprocess.run(["ip", "-n", HOST, "link", "set", "lo", "up"], check=True)
        yield
    finally:
        subprocess.run(["ip", "netns", "delete", HOST], check=True)


@pytest.fixture
def volume(kata: Kata, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A direct volume, and the file with its file system."""
    path, backing = tmp_path / "volume", tmp_path / "backing"
    path.mkdir()
    with backing.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", backing], check=True)
    info = json.dumps({"volume-type": "block", "device": str(backing), "fstype": "ext4"})
    kata.ok("direct-volume", "add", "--volume-path", str(path), "--mount-info", info)
    yield path, backing
    kata.ok("direct-volume", "remove", "--volume-path", str(path))


@contextmanager
def sandbox(kata: Kata, *words: str) -> Iterator[str]:
    """One with a network; it is removed by force, and nothing of it may be left."""
    name = kata.name()
    command = kata_command("run", "-d", "--name", name, "--net", "bridge", *words, "busybox", "sleep", "100000")
    done = subprocess.run(
        ["nsenter", f"--net=/run/netns/{HOST}", "--", *command], capture_output=True, text=True, timeout=180
    )
    try:
        assert done.returncode == 0, done
        yield name
    finally:
        remove = ["nsenter", f"--net=/run/netns/{HOST}", "--", *kata_command("delete", "--force", name)]
        removed = subprocess.run(remove, capture_output=True, text=True, timeout=180)
        assert (removed.returncode, removed.stderr) == (0, ""), removed
        assert leftovers(name) == []


def supervisor_of(name: str) -> int:
    found = record_of(name)["supervisor_pid"]
    assert isinstance(found, int)
    return found


def stop(pid: int) -> None:
    """All its threads are stopped when this returns."""
    os.kill(pid, signal.SIGSTOP)
    while not all(is_stopped(Path(task)) for task in Path(f"/proc/{pid}/task").iterdir()):
        os.sched_yield()


def is_stopped(task: Path) -> bool:
    return (task / "stat").read_text().rpartition(")")[2].split()[0] == "T"


def facts_of(kata: Kata, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(kata.ok("inspect", name, "--json"))
    return found


def recorded(facts: dict[str, Any], kind: str) -> list[str]:
    """Of this kind on record; the VMM has all that is on record."""
    assert [one for one in facts["devices"] if one["in_vmm"] is not True] == []
    return [one["name"] for one in facts["devices"] if one["kind"] == kind]


def reasons(facts: dict[str, Any]) -> dict[str, str]:
    return {one["part"]: one["why"] for one in facts["missing"] if one["part"] != "network.nft"}


def test_a_sandbox_is_changed_beside_it_and_it_goes_on(kata: Kata, volume: tuple[Path, Path]) -> None:
    path, backing = volume
    with sandbox(kata, "-v", f"{path}:/data") as name:
        facts = facts_of(kata, name)
        assert reasons(facts) == {}
        assert recorded(facts, "nic") == ["eth0"]
        assert len(recorded(facts, "disk")) == 2
        mem_mib = kata.listed(name)["memory_mib"]
        dimms = len(recorded(facts, "memory"))
        assert "eth0" in kata.ok("exec", name, "ip", "link")

        supervisor = supervisor_of(name)
        stop(supervisor)
        assert kata.listed(name)["state"] == "running"
        facts = facts_of(kata, name)
        assert set(reasons(facts)) == {"guest"}
        assert facts["hypervisor"]["status"] == "running"
        assert recorded(facts, "nic") == ["eth0"]
        asyncio.run(unplug_nic(STORE, name, "eth0"))
        assert asyncio.run(resize_memory(STORE, name, mem_mib + 128)) == mem_mib + 128
        os.truncate(backing, 96 << 20)
        larger = ("direct-volume", "resize", "--volume-path", str(path), "--size", str(96 << 20))
        refused = kata(*larger)
        assert refused.code != 0
        assert f"its disk has {96 << 20} bytes now" in refused.stderr
        facts = facts_of(kata, name)
        assert recorded(facts, "nic") == []
        assert len(recorded(facts, "memory")) == dimms + 1
        assert not [one for one in facts["hypervisor"]["devices"] if one["driver"] == "virtio-net-pci"]
        assert kata.listed(name)["memory_mib"] == mem_mib + 128

        os.kill(supervisor, signal.SIGCONT)
        assert "eth0" not in kata.ok("exec", name, "ip", "link")
        kata.ok(*larger)
        blocks = kata.ok("exec", name, "df", "-k", "/data").splitlines()[-1].split()[1]
        assert int(blocks) > 80 << 10, "the file system has grown, too"
        assert record_of(name)["mem_mib"] == mem_mib + 128, "it has taken notice"

        stop(supervisor)
        (disk,) = [one["name"] for one in facts["devices"] if one["host"] == str(backing)]
        asyncio.run(unplug_disk(STORE, name, disk))
        assert len(recorded(facts_of(kata, name), "disk")) == 1


def test_memory_that_was_plugged_is_the_guests(kata: Kata) -> None:
    with sandbox(kata) as name:

        def total_kib() -> int:
            return int(kata.ok("exec", name, "grep", "MemTotal", "/proc/meminfo").split()[1])

        before, mem_mib = total_kib(), kata.listed(name)["memory_mib"]
        supervisor = supervisor_of(name)
        stop(supervisor)
        asyncio.run(resize_memory(STORE, name, mem_mib + 256))
        os.kill(supervisor, signal.SIGCONT)
        assert total_kib() > before + (240 << 10)
