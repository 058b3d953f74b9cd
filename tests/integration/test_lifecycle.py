"""A sandbox on a real VM: what it has, what can be plugged into it, how it dies, and that no start that fails
or is cancelled leaves anything. One VM is booted to its agent, and one is a clone; the others do not get that far."""

import asyncio
import os
import shutil
import signal
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from vm_helper import Owned, cloned_plan, needs_guest_image, needs_vm, resources, sandbox_plan, settled

from katapod.host.mountinfo import mounts_below
from katapod.host.state import StateStore
from katapod.model.errors import KatapodError, MissingProgram, NotFound
from katapod.model.record import State
from katapod.plan.container_spec import ContainerOptions, ProcessDefaults, plan_container_spec, plan_exec_process
from katapod.rpc.oci_message import process_to_message
from katapod.sandbox.client import start_exec
from katapod.sandbox.container import Container, ContainerPlan, Rootfs, create_container
from katapod.sandbox.lifecycle import Sandbox, start_sandbox
from katapod.sandbox.stdio import NullSink, carry
from katapod.vmm.errors import VmmRefused
from kit.sinks import Kept

pytestmark = [
    *needs_vm,
    needs_guest_image,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.qemu("QEMU's machines by the library"),
]

BUSYBOX = shutil.which("busybox") or "/bin/busybox"


@pytest.fixture(scope="module")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rootfs")
    for name in ("bin", "proc", "sys", "dev", "tmp", "etc"):
        (root / name).mkdir()
    shutil.copy(BUSYBOX, root / "bin" / "busybox")
    for name in ("sh", "cat", "nproc", "sleep"):
        (root / "bin" / name).symlink_to("busybox")
    return root


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def vm_booted(store: StateStore) -> AsyncIterator[Sandbox]:
    with Owned(store, "booted") as owned:
        sandbox = await start_sandbox(sandbox_plan(store.layout, "booted"), store)
        try:
            yield sandbox
        finally:
            await sandbox.close()
        assert owned.left() == []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def container_created(vm_booted: Sandbox, rootfs: Path) -> Container:
    options = ContainerOptions(args=("sleep", "10000"))
    spec = plan_container_spec(ProcessDefaults(env=("PATH=/bin",)), options, str(rootfs))
    container = await create_container(vm_booted, ContainerPlan("c1", "busybox", spec, Rootfs(rootfs)))
    await container.start()
    return container


async def inside(container: Container, *words: str) -> str:
    process = plan_exec_process(container.plan.spec, words)
    running = await start_exec(container.sandbox.agent, "c1", process_to_message(process), user="")
    out = Kept()
    assert await carry(running, None, out, NullSink()) == 0
    return out.data.decode()


async def disks(container: Container) -> set[str]:
    return {line.split()[3] for line in (await inside(container, "cat", "/proc/partitions")).splitlines()[2:]}


async def memory_mib(container: Container) -> int:
    return int((await inside(container, "cat", "/proc/meminfo")).split()[1]) >> 10


async def threads_max(container: Container) -> int:
    return int(await inside(container, "cat", "/proc/sys/kernel/threads-max"))


async def grown(container: Container, at_least_mib: int) -> bool:
    for _ in range(600):
        if await memory_mib(container) >= at_least_mib:
            return True
        await asyncio.sleep(0.1)
    return False


async def test_what_is_on_disk_of_a_living_sandbox(vm_booted: Sandbox, store: StateStore) -> None:
    record = store.read("booted")
    assert (record.state, record.vmm_pid, record.vcpus, record.mem_mib) == (State.RUNNING, vm_booted.vm.pid, 1, 256)
    assert str(vm_booted.paths.shared) in mounts_below(vm_booted.paths.share)
    assert not vm_booted.death.done()


async def test_a_disk_comes_and_goes(container_created: Container, tmp_path: Path) -> None:
    sandbox = container_created.sandbox
    before = await disks(container_created)
    image = tmp_path / "disk"
    with pytest.raises(VmmRefused):
        await sandbox.add_disk("d1", image, read_only=False)
    image.write_bytes(bytes(8 << 20))
    for _ in range(2):  # the slot and the names are free again
        assert await sandbox.add_disk("d1", image, read_only=False) == "02/02"
        assert await settled_async(container_created, before, {"vda"})
        await sandbox.remove_disk("d1")
        assert await settled_async(container_created, before, set())
    with pytest.raises(NotFound, match="cannot unplug disk d1"):
        await sandbox.remove_disk("d1")


async def settled_async(container: Container, before: set[str], more: set[str]) -> bool:
    for _ in range(600):
        if await disks(container) - before == more:
            return True
        await asyncio.sleep(0.1)
    return False


async def test_vcpus_and_memory_grow(container_created: Container, store: StateStore) -> None:
    sandbox = container_created.sandbox
    before = await memory_mib(container_created)
    assert await inside(container_created, "nproc") == "1\n"
    await sandbox.resize(vcpus=2, mem_mib=300)
    assert await grown(container_created, before + 120)  # a whole block
    assert await memory_mib(container_created) <= before + 128
    assert await inside(container_created, "nproc") == "2\n"
    record = store.read("booted")
    assert (record.vcpus, record.mem_mib) == (2, 384)
    await sandbox.resize(vcpus=1, mem_mib=64)
    assert (sandbox.guest_vcpus, sandbox.guest_mem_mib) == (2, 384)


async def test_growth_beyond_the_maximum(container_created: Container) -> None:
    sandbox = container_created.sandbox
    with pytest.raises(KatapodError, match="cannot add") as caught:
        await sandbox.resize(vcpus=99, mem_mib=0)
    assert "default_maxvcpus" in caught.value.hint
    with pytest.raises(VmmRefused, match="cannot device_add"):
        await sandbox.resize(vcpus=0, mem_mib=8192)
    before = await memory_mib(container_created)
    await sandbox.resize(vcpus=0, mem_mib=512)  # the failed attempt holds no slot and no name
    assert await grown(container_created, before + 120)
    expected = pytest.approx((before + 128) * 8, rel=0.06)  # a thread for each 128 KiB
    for _ in range(600):  # the kernel's limits follow, for processes that run already too, one growth after the other
        threads = await threads_max(container_created)
        if threads == expected:
            break
        await asyncio.sleep(0.1)
    assert threads == expected
    assert f"Max processes {threads // 2} {threads // 2} processes" in " ".join(
        (await inside(container_created, "cat", "/proc/1/limits")).split()
    )


async def test_the_end_of_one_that_hangs(vm_booted: Sandbox, store: StateStore) -> None:
    """The last of the module: QEMU is stopped, so neither the guest nor the monitor answers."""
    os.kill(vm_booted.vm.pid, signal.SIGSTOP)
    started = time.monotonic()
    closing = [asyncio.create_task(vm_booted.close())]
    await asyncio.sleep(0.2)
    closing[0].cancel()  # whoever loses patience: the release goes on to its end
    closing.append(asyncio.create_task(vm_booted.close()))
    results = await asyncio.gather(*closing, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert time.monotonic() - started < 180
    assert not Path(f"/proc/{vm_booted.vm.pid}").exists()
    assert not vm_booted.paths.share.exists()


@pytest.mark.parametrize("victim", ["qemu"])
async def test_a_killed_process_is_the_cause_that_all_calls_name(store: StateStore, victim: str) -> None:
    with Owned(store, f"killed-{victim}") as owned:
        sandbox = await start_sandbox(cloned_plan(store.layout, owned.sandbox_id), store)
        waiting = asyncio.create_task(sandbox.guard(sandbox.agent.wait_process("none", "none")))
        asleep = asyncio.create_task(sandbox.guard(asyncio.sleep(60)))
        os.kill(sandbox.vm.pid, signal.SIGKILL)
        async with asyncio.timeout(180):
            assert "QEMU ended unexpectedly: killed by SIGKILL" in str(await sandbox.death)
            with pytest.raises(KatapodError, match="killed by SIGKILL"):
                await asleep
        results = await asyncio.gather(waiting, return_exceptions=True)
        assert isinstance(results[0], KatapodError)
        started = time.monotonic()
        await sandbox.close()
        await sandbox.close()
        assert time.monotonic() - started < 180
        assert owned.left() == []


GARBAGE = "garbage"


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"virtiofsd": "/none/virtiofsd"}, "cannot run /none/virtiofsd"),
        ({"virtiofsd": "/bin/false"}, "virtiofsd ended unexpectedly: exit status 1"),
        ({"qemu": "/none/qemu"}, "cannot run /none/qemu"),
        ({"qemu": "/bin/false"}, "cannot start QEMU: exit status 1"),
        ({"initrd": Path("/none/initrd")}, "/none/initrd"),
        ({"agent_timeout_s": 0.5}, r"its agent did not answer within 0\.5 s"),
        ({"initrd": GARBAGE}, "last lines of the guest's console:"),
    ],
    ids=["no-virtiofsd", "virtiofsd-fails", "no-qemu", "qemu-fails", "no-initrd", "slow-agent", "bad-initrd"],
)
async def test_a_start_that_fails_leaves_nothing(
    store: StateStore, tmp_path: Path, change: dict[str, object], cause: str
) -> None:
    if change.get("initrd") == GARBAGE:
        (tmp_path / "initrd").write_bytes(b"no archive" * 1000)
        change = {"initrd": tmp_path / "initrd"}
    before = resources()
    name = f"fails-{uuid.uuid4().hex[:8]}"
    with Owned(store, name) as owned:
        with pytest.raises((KatapodError, MissingProgram), match=cause):
            await start_sandbox(sandbox_plan(store.layout, name, **change), store)  # type: ignore[arg-type]
        assert await settled(lambda: owned.left() == []), owned.left()
    await asyncio.sleep(0.05)
    assert resources() == before


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("delay_s", [0.0, 0.01, 0.05, 0.1, 0.2, 0.4, 1.0])
async def test_a_cancelled_start_leaves_nothing(store: StateStore, delay_s: float, times: int) -> None:
    """Three times: a user who presses Ctrl-C again while the first is being carried out."""
    before = resources()
    name = f"cancelled-{int(delay_s * 1000)}-{times}"
    with Owned(store, name) as owned:
        task = asyncio.create_task(start_sandbox(sandbox_plan(store.layout, name), store))
        await asyncio.sleep(delay_s)
        for _ in range(times):
            task.cancel()
            await asyncio.sleep(0.01)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await settled(lambda: owned.left() == []), owned.left()
    await asyncio.sleep(0.05)
    assert resources() == before
