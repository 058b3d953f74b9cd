"""Nothing of the host is shared with a guest that needs nothing of it: there is no virtiofsd then."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

import katapod
from kit.kata import Kata, wait_for


def virtiofsd_of(found: dict[str, Any]) -> list[int]:
    return [each["pid"] for each in found["processes"] if each["role"] == "virtiofsd"]


def inspected(kata: Kata, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(kata.ok("inspect", "--json", name))
    return found


@pytest.mark.core
def test_a_container_of_an_image_alone_shares_nothing(kata: Kata) -> None:
    name = kata.start("--network", "none", "busybox", "sleep", "1000")
    found = inspected(kata, name)
    assert (virtiofsd_of(found), found["share"]) == ([], None)
    assert "share" not in [device["kind"] for device in found["devices"]]
    assert not [each for each in found["missing"] if each["part"] == "share"]
    assert "none: no file of the host is shared" in kata.ok("inspect", name)
    assert "virtiofs" not in kata.ok("exec", name, "cat", "/proc/mounts")
    assert kata.ok("exec", name, "cat", "/etc/hostname") == f"{name}\n"
    kata.ok("exec", name, "sh", "-c", "echo 192.0.2.1 elsewhere >> /etc/hosts")
    assert "elsewhere" in kata.ok("exec", name, "cat", "/etc/hosts")
    assert "kata_virtiofsd_threads" not in kata.ok("metrics", name)


def test_who_is_put_behind_others_serves_on(kata: Kata, tmp_path: Path) -> None:
    """A thread of the daemon in C that comes later may not want the nice value that the others had."""
    name = kata.start("-v", f"{tmp_path}:/v", "busybox", "sleep", "1000")
    daemons = virtiofsd_of(inspected(kata, name))
    tasks = [Path(f"/proc/{pid}/task") for pid in daemons]
    wait_for(lambda: "pool\n" not in [path.read_text() for each in tasks for path in each.glob("*/comm")], "none works")
    for thread in [int(thread.name) for task in tasks for thread in task.iterdir()]:
        os.setpriority(os.PRIO_PROCESS, thread, 19)
    assert kata.ok("exec", name, "sh", "-c", "echo written > /v/file; cat /v/file") == "written\n"
    assert virtiofsd_of(inspected(kata, name)) == daemons


@pytest.mark.core
def test_a_volume_is_shared(kata: Kata, tmp_path: Path) -> None:
    name = kata.start("-v", f"{tmp_path}:/v", "busybox", "sleep", "1000")
    found = inspected(kata, name)
    assert virtiofsd_of(found) != []
    assert [each["host"] for each in found["share"]["mounts"]] == [str(tmp_path)], "its files of /etc are not"
    assert kata.ok("exec", name, "cat", "/etc/hostname") == f"{name}\n"


async def test_what_a_later_container_shares_is_plugged_for_it(kata: Kata, tmp_path: Path) -> None:
    name, first, second = kata.name(), kata.name(), kata.name()
    (tmp_path / "given").write_text("by the host")
    copy, volumes = ("sh", "-c", "cp /v/given /v/taken"), [f"{tmp_path}:/v"]
    async with (
        katapod.Sandbox.open(name=name, network="none") as sandbox,
        sandbox.create("busybox", "sleep", "1000", name=first) as one,
    ):
        await one.start()
        assert virtiofsd_of(inspected(kata, name)) == []
        async with sandbox.create("busybox", *copy, name=second, volumes=volumes) as other:
            await other.start()
            assert await other.wait() == 0
        found = inspected(kata, name)
        assert virtiofsd_of(found) != []
        assert "share" in [device["kind"] for device in found["devices"]]
        assert (await one.run("cat", "/etc/hostname")).text == f"{name}\n", "its own files are as they were"
        async with sandbox.create("busybox", "mv", "/v/taken", "/v/kept", name=second, volumes=volumes) as other:
            await other.start()
            assert await other.wait() == 0
    assert (tmp_path / "kept").read_text() == "by the host"


def test_a_machine_without_virtiofsd_is_sound(kata: Kata, tmp_path: Path) -> None:
    """Only who needs one is refused."""
    config = tmp_path / "configuration.toml"
    config.write_text('[hypervisor.qemu]\nvirtio_fs_daemon = "/bin/false"\n')
    done = kata("--config", str(config), "run", "--rm", "--network", "none", "busybox", "echo", "fine")
    assert (done.code, done.stdout) == (0, "fine\n")
    done = kata("--config", str(config), "run", "--rm", "-v", f"{tmp_path}:/v", "busybox", "true")
    assert done.code == 125
    assert "virtiofsd ended" in done.stderr
