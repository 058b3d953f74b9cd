"""A sandbox by its record alone, on the fake VMM: beside its supervisor, instead of it, and killed in the middle."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest

from katapod.host.device_file import DeviceFile
from katapod.host.locks import LockTaken
from katapod.host.state import StateStore
from katapod.model.devices import DeviceRecord, NicEntry
from katapod.model.errors import InvalidState, KatapodError, NotFound
from katapod.model.record import ContainerRecord, State
from katapod.plan.root_disk import root_disk_id
from katapod.sandbox import devices
from katapod.sandbox.lifecycle import Sandbox
from katapod.sandbox.recorded import resize_disk, resize_memory, unplug_disk, unplug_nic
from katapod.sandbox.vmm_link import ask_vmm
from katapod.vmm.devices import Nic
from katapod.vmm.errors import VmmLinkBroken, VmmRefused
from kit.stage import Stage, stage_at

NIC = NicEntry(0, 20, "eth0", "tap0_kata", "02:00:00:00:00:01", 1500, guest_path="place/20")


class Killed(BaseException):
    """Of a process that ends where it is."""


async def killed() -> None:
    raise Killed


@pytest.fixture
async def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stage]:
    async with stage_at(tmp_path, monkeypatch) as found:
        yield found


@pytest.fixture
async def sandbox(stage: Stage) -> AsyncIterator[Sandbox]:
    """With a NIC."""
    sandbox = await stage.open()
    sandbox.devices.table = sandbox.devices.table.with_nic(NIC)
    sandbox.devices.note()
    stage.vmm.vm.attached["nic 0"] = Nic(0, NIC.mac, NIC.slot)
    yield sandbox
    await sandbox.close()


def on_disk(stage: Stage) -> DeviceRecord:
    found = DeviceFile(stage.store.layout.sandbox("s1")).read()
    assert found is not None
    return found


def in_vm(stage: Stage) -> set[str]:
    return set(stage.vmm.vm.attached)


def in_table(stage: Stage) -> set[str]:
    table = stage.record.devices
    assert table.share is not None
    names = {f"share {table.share.tag}", *(f"disk {disk.disk_id}" for disk in table.disks)}
    return names | {f"nic {nic.number}" for nic in table.nics} | {f"memory {dimm.number}" for dimm in table.dimms}


def known(sandbox: Sandbox) -> int:
    """NICs in the supervisor's own table."""
    return len(sandbox.devices.table.nics)


# -- what can be done


async def test_a_nic_is_unplugged_and_the_supervisor_takes_notice(stage: Stage, sandbox: Sandbox) -> None:
    await unplug_nic(stage.store, "s1", "eth0", vmm=stage.vmm)
    assert "nic 0" not in in_vm(stage)
    assert stage.record.devices.nics == ()
    assert known(sandbox) == 1, "it has had nothing to do with its devices yet"
    await sandbox.add_disk("d1", Path("/dev/sdx"), read_only=True)
    assert known(sandbox) == 0
    assert in_table(stage) == in_vm(stage)


async def test_a_disk_is_unplugged_and_its_slot_is_free_for_the_supervisor(stage: Stage, sandbox: Sandbox) -> None:
    assert await sandbox.add_disk("d1", Path("/dev/sdx"), read_only=True) == "place/11"
    await sandbox.add_disk("d2", Path("/dev/sdy"), read_only=True)
    assert (await unplug_disk(stage.store, "s1", "d1", vmm=stage.vmm)).path == "/dev/sdx"
    assert await sandbox.add_disk("d3", Path("/dev/sdz"), read_only=True) == "place/11"
    with pytest.raises(NotFound, match="cannot unplug disk d1: it is not plugged"):
        await sandbox.remove_disk("d1")
    assert in_table(stage) == in_vm(stage) == {"share kataShared", "nic 0", "disk root-1", "disk d2", "disk d3"}


async def test_memory_is_plugged_and_the_supervisor_counts_it(stage: Stage, sandbox: Sandbox) -> None:
    assert await resize_memory(stage.store, "s1", 400, vmm=stage.vmm) == 512
    assert stage.record.mem_mib == 512
    sandbox.save(error="its own word")
    assert (stage.record.mem_mib, stage.record.error) == (512, "its own word"), "neither loses what the other wrote"
    await sandbox.resize(vcpus=1, mem_mib=600)
    assert [dimm.number for dimm in stage.record.devices.dimms] == [0, 1]
    assert (sandbox.guest_mem_mib, stage.record.mem_mib) == (640, 640)
    assert in_table(stage) == in_vm(stage)
    assert await resize_memory(stage.store, "s1", 640, vmm=stage.vmm) == 640, "as it is"


async def test_a_disk_is_as_large_as_its_file(stage: Stage, sandbox: Sandbox, tmp_path: Path) -> None:
    file = tmp_path / "volume"
    file.write_bytes(bytes(8192))
    await sandbox.add_disk("d1", file, read_only=False)
    assert await resize_disk(stage.store, "s1", str(file), 4096, vmm=stage.vmm) == 8192
    assert stage.vmm.vm.said[-1] == "resize d1 to 8192"
    with pytest.raises(KatapodError, match="to 9000 bytes: it has 8192"):
        await resize_disk(stage.store, "s1", str(file), 9000, vmm=stage.vmm)
    with pytest.raises(NotFound, match="its VM has no such disk"):
        await resize_disk(stage.store, "s1", "/dev/none", vmm=stage.vmm)


async def test_the_vmm_is_asked(stage: Stage, sandbox: Sandbox) -> None:
    hypervisor, missing = await ask_vmm(stage.store, "s1", 1.0, vmm=stage.vmm)
    assert (hypervisor, missing[0].why) == (None, "there is no VMM")


# -- what is refused


async def test_memory_does_not_come_out(stage: Stage, sandbox: Sandbox) -> None:
    with pytest.raises(InvalidState, match="cannot resize s1 to 100 MiB: it has 256, and memory is not taken out"):
        await resize_memory(stage.store, "s1", 100, vmm=stage.vmm)
    with pytest.raises(KatapodError, match="cannot resize s1 to 5000 MiB: its VM can have 1024"):
        await resize_memory(stage.store, "s1", 5000, vmm=stage.vmm)
    assert in_table(stage) == in_vm(stage)


async def test_memory_that_the_guest_does_not_take_stays(stage: Stage, sandbox: Sandbox) -> None:
    stage.vmm.memory_refusal = "ACPI status 0x1"
    with pytest.raises(VmmRefused, match="cannot plug 256 MiB: the guest refused with ACPI status 0x1"):
        await resize_memory(stage.store, "s1", 512, vmm=stage.vmm)
    assert in_table(stage) == in_vm(stage)


async def test_the_root_of_a_container_stays(stage: Stage, sandbox: Sandbox) -> None:
    await sandbox.add_disk(root_disk_id("c1"), Path("/d"), read_only=False)
    sandbox.save(containers=(ContainerRecord("c1", "", (), state=State.RUNNING),))
    with pytest.raises(InvalidState, match="container c1, whose root it is, is running"):
        await unplug_disk(stage.store, "s1", root_disk_id("c1"), vmm=stage.vmm)
    sandbox.save(containers=(ContainerRecord("c1", "", (), state=State.STOPPED),))
    await unplug_disk(stage.store, "s1", root_disk_id("c1"), vmm=stage.vmm)


async def test_what_does_not_run(stage: Stage, sandbox: Sandbox) -> None:
    for changes, words in (
        ({"state": State.CREATING}, "it is creating; needs running"),
        ({"state": State.STOPPED}, "it is stopped; needs running"),
        ({"pooled": True}, "it is an idle machine of the pool"),
    ):
        stage.store.write(msgspec.structs.replace(sandbox.record, **changes))
        with pytest.raises(InvalidState, match=words):
            await unplug_nic(stage.store, "s1", "eth0", vmm=stage.vmm)
    stage.store.write(sandbox.record)
    stage.store.layout.sandbox("s1").devices.unlink()
    with pytest.raises(InvalidState, match="a former version has started it"):
        await unplug_nic(stage.store, "s1", "eth0", vmm=stage.vmm)
    with pytest.raises(NotFound):
        await unplug_nic(stage.store, "none", "eth0", vmm=stage.vmm)


async def test_a_vmm_that_takes_no_second_connection(stage: Stage, sandbox: Sandbox) -> None:
    stage.vmm.fails["connect"] = VmmRefused("cannot connect to it: it takes no second connection")
    before = on_disk(stage)
    with pytest.raises(VmmRefused, match="no second connection"):
        await resize_memory(stage.store, "s1", 512, vmm=stage.vmm)
    assert on_disk(stage) == before


# -- both at once


SUPERVISORS: dict[str, tuple[str, Callable[[Sandbox], Coroutine[Any, Any, Any]]]] = {
    "a disk comes": ("attach disk d1", lambda sandbox: sandbox.add_disk("d1", Path("/d"), read_only=True)),
    "a disk goes": ("detach disk d0", lambda sandbox: sandbox.remove_disk("d0")),
    "memory comes": ("attach memory 0", lambda sandbox: sandbox.resize(vcpus=1, mem_mib=512)),
    "vCPUs come": ("add 1 vCPUs", lambda sandbox: sandbox.resize(vcpus=2, mem_mib=256)),
    "a disk is resized": ("resize d0 to 8192", lambda sandbox: sandbox.resize_disk("d0", 8192)),
}


@pytest.mark.parametrize("change", SUPERVISORS)
@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_change_of_the_supervisor_that_does_not_end_keeps_others_out(
    change: str, when: str, stage: Stage, sandbox: Sandbox
) -> None:
    """As one that is stopped by a signal in it, wherever that is: before the VMM has done it, and after."""
    await sandbox.add_disk("d0", Path("/d"), read_only=True)
    what, work = SUPERVISORS[change]
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def stand() -> None:
        reached.set()
        await go_on.wait()

    getattr(stage.vmm, when)[what] = stand
    changing = asyncio.create_task(work(sandbox))
    await reached.wait()
    before = on_disk(stage)
    with pytest.raises(LockTaken, match="cannot unplug eth0 of s1: process "):
        await unplug_nic(stage.store, "s1", "eth0", vmm=stage.vmm, limit_s=0.05)
    assert on_disk(stage) == before
    go_on.set()
    await changing
    await unplug_nic(stage.store, "s1", "eth0", vmm=stage.vmm)
    assert in_table(stage) == in_vm(stage)


async def test_all_at_once(stage: Stage, sandbox: Sandbox) -> None:
    """Each waits for the others' changes, and no two choose the same place."""
    await sandbox.add_disk("d0", Path("/d"), read_only=True)

    async def turn() -> None:
        await asyncio.sleep(0)

    for what in ("attach disk d1", "attach disk d2", "detach disk d0", "detach nic 0", "attach memory 0"):
        stage.vmm.before[what] = stage.vmm.after[what] = turn
    places = await asyncio.gather(
        sandbox.add_disk("d1", Path("/d"), read_only=True),
        unplug_disk(stage.store, "s1", "d0", vmm=stage.vmm),
        resize_memory(stage.store, "s1", 768, vmm=stage.vmm),
        sandbox.add_disk("d2", Path("/d"), read_only=True),
        unplug_nic(stage.store, "s1", "eth0", vmm=stage.vmm),
        sandbox.resize(vcpus=1, mem_mib=640),
    )
    assert places[0] != places[3]
    assert in_table(stage) == in_vm(stage)
    table = stage.record.devices
    assert len(table.slots) == 1 + len(table.disks) + len(table.nics)
    assert stage.record.mem_mib == 768


async def test_one_that_is_stopped_with_the_lock_hangs_nobody(
    stage: Stage, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "LOCK_LIMIT_S", 0.05)
    async with DeviceFile(stage.store.layout.sandbox("s1")).locked(1.0, "test"):
        with pytest.raises(LockTaken, match="cannot change the devices of the VM"):
            await sandbox.add_disk("d1", Path("/d"), read_only=True)
    assert await sandbox.add_disk("d1", Path("/d"), read_only=True) == "place/11"


# -- killed in the middle

CHANGES: dict[str, tuple[str, Callable[[Stage], Coroutine[Any, Any, Any]]]] = {
    "a NIC": ("detach nic 0", lambda stage: unplug_nic(stage.store, "s1", "eth0", vmm=stage.vmm)),
    "a disk": ("detach disk d1", lambda stage: unplug_disk(stage.store, "s1", "d1", vmm=stage.vmm)),
    "memory": ("attach memory 0", lambda stage: resize_memory(stage.store, "s1", 512, vmm=stage.vmm)),
}


async def killed_in(stage: Stage, monkeypatch: pytest.MonkeyPatch, change: str, step: str) -> None:
    what, work = CHANGES[change]
    with monkeypatch.context() as patched:
        if step in ("before", "after"):
            getattr(stage.vmm, step)[what] = killed
        else:
            write, left = DeviceFile.write, int(step)

            def failing(self: DeviceFile, record: DeviceRecord) -> None:
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed
                write(self, record)

            patched.setattr(DeviceFile, "write", failing)
        with pytest.raises(Killed):
            await work(stage)
    stage.vmm.before.clear()
    stage.vmm.after.clear()


WRITES = {"a NIC": 3, "a disk": 3, "memory": 2}
STEPS = [
    (change, step)
    for change, writes in WRITES.items()
    for step in ("before", "after", *(str(number) for number in range(writes)))
]


@pytest.mark.parametrize(("change", "step"), STEPS)
@pytest.mark.parametrize("next_one", ["another", "supervisor"])
async def test_killed_in_the_middle(
    change: str, step: str, next_one: str, stage: Stage, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever comes next finds out what is there, and goes on from it."""
    await sandbox.add_disk("d1", Path("/d"), read_only=True)
    await killed_in(stage, monkeypatch, change, step)
    if next_one == "another":
        await resize_memory(stage.store, "s1", stage.record.mem_mib, vmm=stage.vmm)
        assert in_table(stage) == in_vm(stage)
        assert not on_disk(stage).unsettled
    place = await sandbox.add_disk("d2", Path("/d"), read_only=True)
    assert place == ("place/11" if "disk d1" not in in_vm(stage) else "place/12")
    assert in_table(stage) == in_vm(stage)
    await sandbox.resize(vcpus=1, mem_mib=768)
    assert stage.record.mem_mib == 768
    assert in_table(stage) == in_vm(stage)
    if change == "memory" and step == "after":
        assert [dimm.size_mib for dimm in stage.record.devices.dimms] == [256, 256]


async def test_what_the_vmm_cannot_be_asked_of_is_asked_by_the_next(
    stage: Stage, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    await killed_in(stage, monkeypatch, "a NIC", "after")
    stage.vmm.fails["settle nic 0"] = VmmLinkBroken("it does not answer")
    with pytest.raises(VmmLinkBroken):
        await sandbox.add_disk("d1", Path("/d"), read_only=True)
    del stage.vmm.fails["settle nic 0"]
    await sandbox.add_disk("d1", Path("/d"), read_only=True)
    assert in_table(stage) == in_vm(stage)


async def test_what_the_guest_keeps_is_still_on_record(stage: Stage, sandbox: Sandbox) -> None:
    stage.vmm.fails["detach nic 0"] = VmmRefused("the guest did not let go")
    with pytest.raises(VmmRefused):
        await unplug_nic(stage.store, "s1", "eth0", vmm=stage.vmm)
    assert stage.record.devices.nics == (NIC,)
    del stage.vmm.vm.attached["nic 0"]  # later it does
    await sandbox.add_disk("d1", Path("/d"), read_only=True)
    assert in_table(stage) == in_vm(stage)


async def test_a_damaged_table_keeps_nobody_from_the_record(stage: Stage, sandbox: Sandbox) -> None:
    stage.store.layout.sandbox("s1").devices.write_text("{")
    assert stage.record.state is State.RUNNING
    with pytest.raises(KatapodError, match="cannot read "):
        await unplug_nic(stage.store, "s1", "eth0", vmm=stage.vmm)


def test_a_fresh_process_reads_what_was_written(tmp_path: Path) -> None:
    """A record of a former version has its devices inside."""
    from katapod.model.devices import DeviceTable
    from katapod.model.record import SandboxRecord
    from kit.library import layout_below

    store = StateStore(layout_below(tmp_path))
    paths = store.layout.sandbox("s1")
    paths.state.mkdir(parents=True)
    record = SandboxRecord("s1", 1.0, 1, "b", devices=DeviceTable(nics=(NIC,)))
    paths.persist.write_bytes(msgspec.json.encode(record))
    assert store.read("s1").devices.nics == (NIC,)
    store.write(record)
    assert store.read("s1").devices == DeviceTable()
