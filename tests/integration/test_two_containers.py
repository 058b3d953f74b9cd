"""Two containers in one sandbox, through the library: neighbours share a VM and not a fate."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from vm_helper import qemu_of

from katapod.host.facts import collect_host_facts, virtiofsd_implementation
from katapod.host.removal import NotRemoved
from katapod.host.state import StateStore
from katapod.images import ImageStore
from katapod.model.config import check_paths, load_config
from katapod.model.errors import KatapodError
from katapod.model.ids import ContainerId
from katapod.model.layout import Layout
from katapod.model.record import SandboxRecord, State
from katapod.model.sizing import ContainerLimits
from katapod.plan.container_spec import ContainerOptions, ProcessDefaults, plan_container_spec
from katapod.sandbox import container as container_module
from katapod.sandbox.container import Container, ContainerPlan, Rootfs, create_container
from katapod.sandbox.errors import CommandNotFound
from katapod.sandbox.lifecycle import Sandbox, start_sandbox
from katapod.sandbox.opening import claimed
from katapod.sandbox.planning import plan_sandbox, size_for
from katapod.sandbox.proof import choose_accelerator
from katapod.sandbox.recovery import remove_sandbox
from katapod.sandbox.stdio import NullSink
from katapod.sandbox.task import watch_oom
from kit.accel import current_accelerator
from kit.kata import Kata
from kit.sinks import Kept

pytestmark = [
    pytest.mark.usefixtures("guest_image", "leaves_nothing"),
    pytest.mark.qemu("QEMU's machines by the library"),
]

LIMIT_BYTES = 48 << 20


@contextlib.asynccontextmanager
async def _sandbox(name: str) -> AsyncIterator[Sandbox]:
    """A sandbox for two containers with LIMIT_BYTES each, and nothing of it afterwards."""
    layout = Layout()
    store, facts, config = StateStore(layout), collect_host_facts(), check_paths(load_config(None), os.path.exists)
    limits = ContainerLimits(memory_bytes=LIMIT_BYTES)
    record = SandboxRecord(
        sandbox_id=name, created_at=time.time(), supervisor_pid=os.getpid(), boot_id=facts.boot_id, auto_remove=True
    )
    async with claimed(store, record):
        choice = await choose_accelerator(
            current_accelerator(),
            config,
            facts,
            layout.proof_file,
            layout.sandbox(name).state,
        )
        plan = plan_sandbox(
            record,
            config,
            facts,
            layout,
            accelerator=choice.accelerator,
            remedy=choice.remedy,
            implementation=await virtiofsd_implementation(config.qemu.virtio_fs_daemon),
            size=size_for(config, facts, (limits, limits)),
            hostname="both",
            shm_size_bytes=16 << 20,
        )
        sandbox = await start_sandbox(plan, store)
        try:
            yield sandbox
        finally:
            await sandbox.close()
            await remove_sandbox(store, name)


async def _container(
    sandbox: Sandbox, container_id: str, *args: str, on_disk: bool = True, **options: Any
) -> Container:
    images = ImageStore(sandbox.store.layout.image_root)
    busybox = await images.acquire("busybox", ContainerId(sandbox.sandbox_id))
    root = images.rootfs_path(busybox.digest)
    chosen = ContainerOptions(args=args, memory_bytes=LIMIT_BYTES, **options)
    spec = plan_container_spec(ProcessDefaults(env=busybox.config.env), chosen, str(root))
    rootfs = Rootfs(root, disk=await images.root_disk(busybox) if on_disk else None)
    container = await create_container(
        sandbox, ContainerPlan(container_id=container_id, image="busybox", spec=spec, rootfs=rootfs)
    )
    await container.start()
    return container


def _is_busy(layout: Layout, directory: Path) -> None:
    raise NotRemoved(f"cannot remove {directory}: Device or resource busy")


@pytest.mark.parametrize("on_disk", [True, False], ids=["disk", "virtio-fs"])
async def test_neighbour_of_a_container_out_of_memory_lives_on(
    kata: Kata, on_disk: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And who could not be removed at first, is removed when what hindered it is over."""
    async with _sandbox(kata.name()) as sandbox:
        talk, containers = Kept(), dict[str, Container]()
        events = asyncio.create_task(watch_oom(sandbox, containers))
        neighbour = await _container(
            sandbox,
            "neighbour",
            "sh",
            "-c",
            "trap 'echo lived on; exit 4' TERM; echo up; while sleep 0.1; do :; done",
            on_disk=on_disk,
        )
        carrying = asyncio.create_task(neighbour.carry(None, talk, NullSink()))
        greedy = containers["greedy"] = await _container(sandbox, "greedy", "tail", "/dev/zero", on_disk=on_disk)
        async with asyncio.timeout(180):
            assert await greedy.carry(None, NullSink(), NullSink()) == 137
            await asyncio.wait_for(greedy.out_of_memory.wait(), 60)
            assert (greedy.record.state, neighbour.record.state) == (State.STOPPED, State.RUNNING)

            with monkeypatch.context() as patch:
                patch.setattr(container_module, "clear_away", _is_busy)
                for _ in range(2):
                    with pytest.raises(KatapodError, match=r"cannot remove all of container greedy: .*busy"):
                        await greedy.remove()
            await greedy.remove()
            assert [item.container_id for item in sandbox.record.containers] == ["neighbour"]
            assert not list(sandbox.paths.mounts.glob("greedy*"))
            assert not (sandbox.paths.layers / "greedy").exists()
            again = await _container(sandbox, "greedy", "true", on_disk=on_disk)
            assert await again.carry(None, NullSink(), NullSink()) == 0

            await neighbour.kill(15)
            assert await carrying == 4
        assert talk.data == b"up\nlived on\n"
        events.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await events


async def test_containers_see_their_own(kata: Kata) -> None:
    """Processes and files are apart; the host name and /dev/shm are the sandbox's."""
    async with _sandbox(kata.name()) as sandbox:
        first = await _container(sandbox, "first", "sh", "-c", "echo x > /dev/shm/given; touch /mine; exec sleep 100")
        carrying = asyncio.create_task(first.carry(None, NullSink(), NullSink()))
        seen = Kept()
        script = "until cat /dev/shm/given; do sleep 0.1; done 2> /dev/null; ls /mine; pidof sleep; hostname; echo $$"
        second = await _container(sandbox, "second", "sh", "-c", script)
        async with asyncio.timeout(180):
            assert await second.carry(None, seen, NullSink()) == 0
            assert seen.data == b"x\nboth\n1\n"
            await first.kill(9)
            assert await carrying == 137


async def test_disks_come_and_go_with_their_containers(kata: Kata) -> None:
    """Also when the agent refuses the container; the slots are used again."""
    async with _sandbox(kata.name()) as sandbox, asyncio.timeout(180):
        for _ in range(2):
            with pytest.raises(CommandNotFound):
                await _container(sandbox, "wrong", "no-such-command")
            assert await _disks(sandbox) == set()
            first = await _container(sandbox, "first", "true")
            assert await first.carry(None, NullSink(), NullSink()) == 0
            assert len(await _disks(sandbox)) == 1
            await first.remove()
            assert await _disks(sandbox) == set()
        assert not list(sandbox.paths.layers.iterdir())


async def test_a_guest_that_overwrites_its_disk_harms_itself_only(kata: Kata) -> None:
    """QEMU writes to the disk as it would for a hostile guest's kernel: to the layer, never to the image."""
    async with _sandbox(kata.name()) as sandbox, asyncio.timeout(180):
        images = ImageStore(sandbox.store.layout.image_root)
        first = await _container(sandbox, "first", "sleep", "100")
        base = await images.root_disk(await images.resolve("busybox"))
        before = _head(base)
        (disk,) = await _disks(sandbox)
        layer = sandbox.paths.layers / "first" / "root.qcow2"
        small = layer.stat().st_size
        command = f'qemu-io {disk} "write -P 0x5a 0 4M"'
        said = await qemu_of(sandbox).qmp.execute("human-monitor-command", {"command-line": command})
        assert "rror" not in said
        assert layer.stat().st_size >= 4 << 20 > small
        assert _head(base) == before
        await first.kill(9)
        await first.carry(None, NullSink(), NullSink())
        second, seen = await _container(sandbox, "second", "echo", "whole"), Kept()
        assert await second.carry(None, seen, NullSink()) == 0
        assert seen.data == b"whole\n"


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(4 << 20)


async def _disks(sandbox: Sandbox) -> set[str]:
    """The names of what QEMU has as root disks."""
    nodes = await qemu_of(sandbox).qmp.execute("query-named-block-nodes", {"flat": True})
    return {node["node-name"] for node in nodes if node["node-name"].startswith("drive-root-")}
