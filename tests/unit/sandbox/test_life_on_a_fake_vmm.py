"""The life of a sandbox on a VMM that runs nothing: each failure of each step of a start, each order of deaths.

All is real but the VMM, the agent, virtiofsd and the mounts of the share. After each test nothing may be left: tasks,
descriptors, directories.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from katapod.model.devices import DeviceTable, DiskEntry, ShareEntry
from katapod.model.errors import KatapodError, NoSpace
from katapod.model.record import SandboxRecord, State
from katapod.rpc.agent import AgentClient
from katapod.sandbox import machine
from katapod.sandbox.agent_link import connect_agent
from katapod.sandbox.errors import AgentFailed, GuestHangs
from katapod.vmm.errors import VmmFailed, VmmLinkBroken, VmmRefused
from katapod.vmm.protocol import DiskError
from katapod.vmm.spec import VmSpec
from kit.fake_vmm import ALL, FakeVm
from kit.loop_time import until
from kit.stage import Stage, agent_is_silent, agent_refuses, share_fails, stage_at, vmm_fails


@pytest.fixture
async def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stage]:
    async with stage_at(tmp_path, monkeypatch) as found:
        yield found


# -- a life


async def test_a_start_that_is_cancelled_as_it_meets_the_agent(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the connection and who waits for it: it is closed as well."""
    met: list[AgentClient] = []

    async def connect(vm: FakeVm, spec: VmSpec, peer: str) -> AgentClient:
        met.append(await connect_agent(vm, spec, peer))
        start.cancel()
        return met[0]

    monkeypatch.setattr(machine, "connect_agent", connect)
    start = asyncio.create_task(stage.open())
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(start, 60)
    assert met[0].connection.closed.done()
    assert met[0].connection.closed.result() == "the connection was closed"


async def test_from_its_start_to_its_end(stage: Stage) -> None:
    sandbox = await stage.open()
    vm = stage.vmm.vm
    assert vm.said == ["attach share kataShared", "attach disk root-1", "run"]
    await until(lambda: "CreateSandbox" in stage.vmm.agent.asked)  # what comes next waits for its answer
    assert stage.vmm.agent.asked == ["Check", "SetGuestDateTime", "CreateSandbox"]
    record = stage.record
    assert (record.state, record.vmm_pid, record.mem_mib, record.vcpus) == (State.RUNNING, vm.pid, 256, 1)
    layer = stage.store.layout.sandbox("s1").layers / "c1" / "root.qcow2"
    assert record.devices == DeviceTable(
        share=ShareEntry(
            "kataShared", 1, str(stage.store.layout.sandbox("s1").vm / "vhost-fs.sock"), guest_path="place/1"
        ),
        disks=(DiskEntry("root-1", 10, str(layer), base=str(stage.root / "base.raw"), guest_path="place/10"),),
    )
    assert sandbox.disk_path("root-1") == "place/10"
    await sandbox.close()
    await sandbox.close()
    assert vm.said[-1] == "stop"
    assert stage.vmm.agent.asked[-1] == "DestroySandbox"


async def test_a_share_that_comes_later(stage: Stage) -> None:
    """What fails of it is undone, and tried again for the next container."""
    sandbox = await stage.open(replace(stage.plan(), shares=False))
    assert (stage.shares, stage.record.devices.share, sandbox.share.pid) == ([], None, None)
    for error in (VmmRefused("no"), KatapodError("no")):
        stage.vmm.fails["attach share kataShared"] = error
        with pytest.raises(KatapodError, match="no"):
            await sandbox.open_share()
        assert (stage.record.devices.share, sandbox.share.pid) == (None, None)
        assert stage.shares.pop().released
    stage.vmm.fails.clear()
    await sandbox.open_share()
    await sandbox.open_share()
    (daemon,) = stage.shares
    assert (daemon.released, sandbox.share.pid) == (False, daemon.child.pid)
    entry = stage.record.devices.share
    assert entry is not None
    (storage,) = sandbox.share_storages
    assert (storage.shared, list(storage.driver_options)) == (True, [f"katapod.place={entry.guest_path}"])
    daemon.end(9)
    assert str(await asyncio.wait_for(sandbox.death, 60)) == "virtiofsd ended unexpectedly: status 9"
    await sandbox.close()


async def test_what_is_expendable_is_not_asked_to_write_out(stage: Stage) -> None:
    sandbox = await stage.open()
    await sandbox.close(expendable=True)
    assert stage.vmm.vm.said[-1] == "kill"
    assert "DestroySandbox" not in stage.vmm.agent.asked


async def test_disks_come_and_go_on_record(stage: Stage) -> None:
    sandbox = await stage.open()
    seen: list[DeviceTable] = []

    async def look() -> None:
        seen.append(stage.record.devices)

    stage.vmm.before["attach disk d1"] = stage.vmm.before["detach disk d1"] = look
    assert await sandbox.add_disk("d1", Path("/dev/sdx"), read_only=True, host_device=True) == "place/11"
    entry = DiskEntry("d1", 11, "/dev/sdx", read_only=True, host_device=True)
    assert seen[0].disk("d1") == entry, "on record before it is attached"
    assert stage.record.devices.disk("d1") == msgspec.structs.replace(entry, guest_path="place/11")
    assert await sandbox.add_disk("d2", Path("/dev/sdy"), read_only=False) == "place/12"
    await sandbox.remove_disk("d1")
    assert seen[1].disk("d1") is not None, "on record until it is detached"
    assert [disk.disk_id for disk in stage.record.devices.disks] == ["root-1", "d2"]
    assert await sandbox.add_disk("d3", Path("/dev/sdz"), read_only=False) == "place/11", "its slot is free again"
    await sandbox.close()


async def test_a_disk_that_is_refused_leaves_the_record(stage: Stage) -> None:
    sandbox = await stage.open()
    before = stage.record
    stage.vmm.fails["attach disk d1"] = VmmRefused("cannot attach it")
    with pytest.raises(VmmRefused):
        await sandbox.add_disk("d1", Path("/dev/sdx"), read_only=True)
    assert stage.record == before
    stage.vmm.fails["attach disk d1"] = VmmLinkBroken("nobody knows")
    with pytest.raises(VmmLinkBroken):
        await sandbox.add_disk("d1", Path("/dev/sdx"), read_only=True)
    assert stage.record.devices.disk("d1") is not None, "it may be there"
    await sandbox.close()


async def test_a_disk_that_the_guest_holds_on_to_can_be_asked_for_again(stage: Stage) -> None:
    sandbox = await stage.open()
    stage.vmm.fails["detach disk root-1"] = VmmRefused("the guest did not let go")
    with pytest.raises(VmmRefused):
        await sandbox.remove_disk("root-1")
    assert stage.record.devices.disk("root-1") is not None
    del stage.vmm.fails["detach disk root-1"]
    await sandbox.remove_disk("root-1")
    assert stage.record.devices.disks == ()
    await sandbox.close()


async def test_all_slots_are_taken(stage: Stage) -> None:
    sandbox = await stage.open()
    for number in range(len(ALL.disk_slots) - 1):
        await sandbox.add_disk(f"d{number}", Path("/d"), read_only=False)
    before = stage.record
    with pytest.raises(KatapodError, match="cannot plug disk more: all 6 slots of the VM are taken") as raised:
        await sandbox.add_disk("more", Path("/d"), read_only=False)
    assert raised.value.hint == ALL.more_slots
    assert stage.record == before
    await sandbox.close()


async def test_it_grows(stage: Stage) -> None:
    sandbox = await stage.open()
    await sandbox.resize(vcpus=2, mem_mib=600)
    assert stage.vmm.vm.said[-2:] == ["add 1 vCPUs", "attach memory 0"]
    assert stage.vmm.agent.asked[-1] == "OnlineCPUMem"
    record = stage.record
    assert (record.vcpus, record.mem_mib) == (2, 256 + 384)
    assert [dimm.size_mib for dimm in record.devices.dimms] == [384]
    stage.vmm.fails["attach memory 1"] = VmmRefused("no memory")
    with pytest.raises(VmmRefused):
        await sandbox.resize(vcpus=2, mem_mib=1024)
    assert (sandbox.guest_mem_mib, stage.record.devices) == (640, record.devices)
    await sandbox.close()


async def test_what_a_vmm_cannot_do_is_refused(stage: Stage) -> None:
    stage.vmm.can = msgspec.structs.replace(ALL, hotplug=False, memory_hotplug=False, vcpu_hotplug=False)
    sandbox = await stage.open()
    for work, words in (
        (sandbox.add_disk("d1", Path("/d"), read_only=False), "cannot plug disk d1"),
        (sandbox.resize(vcpus=2, mem_mib=256), "cannot add 1 vCPUs"),
        (sandbox.resize(vcpus=1, mem_mib=512), "cannot plug 256 MiB"),
    ):
        with pytest.raises(KatapodError, match=words):
            await work
    assert stage.vmm.vm.said == ["attach share kataShared", "attach disk root-1", "run"]
    await sandbox.close()


# -- each step of a start fails

FAILURES = {
    "the VMM does not start": (vmm_fails("start", VmmFailed("cannot start")), VmmFailed, "cannot start"),
    "virtiofsd does not start": (share_fails, KatapodError, "cannot run virtiofsd"),
    "the share is refused": (vmm_fails("attach share kataShared", VmmRefused("no share")), VmmRefused, "no share"),
    "the layer cannot be made": (vmm_fails("attach disk root-1", NoSpace("no room")), NoSpace, "no room"),
    "the disk is refused": (vmm_fails("attach disk root-1", VmmRefused("no disk")), VmmRefused, "no disk"),
    "the link breaks at the disk": (vmm_fails("attach disk root-1", VmmLinkBroken("gone")), VmmLinkBroken, "gone"),
    "the guest does not run": (vmm_fails("run", VmmRefused("no run")), VmmRefused, "no run"),
    "the agent is silent": (agent_is_silent("Check"), GuestHangs, "the guest does not boot"),
    "the agent refuses": (agent_refuses("Check"), AgentFailed, "the agent of sandbox s1 failed: no"),
    "the clock is refused": (agent_refuses("SetGuestDateTime"), AgentFailed, "no"),
    "the sandbox is refused": (agent_refuses("CreateSandbox"), AgentFailed, "no"),
}


@pytest.mark.parametrize("step", FAILURES)
async def test_a_step_that_fails(step: str, stage: Stage) -> None:
    break_it, kind, words = FAILURES[step]
    break_it(stage)
    plan = replace(stage.plan(), agent_timeout_s=0.3) if kind is GuestHangs else None
    with pytest.raises(kind, match=words) as caught:
        await stage.open(plan)
    assert type(caught.value) is kind


@pytest.mark.parametrize("number", range(2))
async def test_a_record_that_cannot_be_written(number: int, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """First when the VMM is up, then when all is."""
    write, written = stage.store.write, 0

    def failing(record: SandboxRecord) -> None:
        nonlocal written
        if written == number:
            raise NoSpace("cannot write the record")
        written += 1
        write(record)

    monkeypatch.setattr(stage.store, "write", failing)
    with pytest.raises(NoSpace, match="cannot write the record"):
        await stage.open()
    assert written == number


# -- it is given up at each step

AGENT_STEPS = ("Check", "SetGuestDateTime", "CreateSandbox")
STEPS = ("start", "attach share kataShared", "attach disk root-1", "run", *AGENT_STEPS)


@pytest.mark.parametrize("step", STEPS)
async def test_a_start_that_is_cancelled(step: str, stage: Stage) -> None:
    reached = asyncio.Event()

    async def stay() -> None:
        reached.set()
        await asyncio.sleep(60)

    (stage.vmm.agent.before if step in AGENT_STEPS else stage.vmm.before)[step] = stay
    start = asyncio.create_task(stage.open())
    await asyncio.wait_for(reached.wait(), 60)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start


# -- deaths, in each order

DEATHS = ("VMM", "virtiofsd", "agent")
TOLD = {
    "VMM": "the VMM ended unexpectedly: status 1",
    "virtiofsd": "virtiofsd ended unexpectedly: status 1",
    "agent": "the agent of sandbox s1",
}


def die(stage: Stage, who: str) -> None:
    if who == "VMM":
        stage.vmm.vm.end(1)
    elif who == "virtiofsd":
        stage.shares[-1].end(1)
    else:
        stage.vmm.vm.hang_up()


@pytest.mark.parametrize(
    ("step", "first"),
    [
        *((step, first) for step in STEPS[1:] for first in DEATHS[:2]),
        *((step, "agent") for step in STEPS if step in AGENT_STEPS),
    ],
)
async def test_a_death_during_the_start(step: str, first: str, stage: Stage) -> None:
    async def dies() -> None:
        if first == "agent":
            raise ConnectionError("the agent ends")
        die(stage, first)
        await asyncio.sleep(60)

    (stage.vmm.agent.before if step in AGENT_STEPS else stage.vmm.before)[step] = dies
    with pytest.raises(KatapodError, match=TOLD[first]):
        await stage.open()


async def test_a_death_before_the_agent_has_begun(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeVm.run

    async def run_and_end(vm: FakeVm) -> None:
        await run(vm)
        vm.end(1)

    monkeypatch.setattr(FakeVm, "run", run_and_end)
    with pytest.raises(KatapodError, match=TOLD["VMM"]):
        await stage.open()


@pytest.mark.parametrize("first", DEATHS)
@pytest.mark.parametrize("then", DEATHS)
async def test_deaths_of_a_sandbox_that_runs(first: str, then: str, stage: Stage) -> None:
    """Whoever died first is named; the agent, whose connection breaks with its VMM, is not."""
    sandbox = await stage.open()
    die(stage, first)
    die(stage, then)
    cause = await asyncio.wait_for(asyncio.shield(sandbox.death), 60)
    named = "VMM" if "VMM" in (first, then) else "virtiofsd" if "virtiofsd" in (first, then) else "agent"
    assert str(cause).startswith(TOLD[named])
    await sandbox.close()
    assert "DestroySandbox" not in stage.vmm.agent.asked


async def test_a_disk_that_the_host_cannot_write_ends_it(stage: Stage) -> None:
    sandbox = await stage.open()
    stage.vmm.vm.tell_of_disk(DiskError("root-1", writing=True, full=True, stopped=True))
    assert isinstance(sandbox.death.result(), NoSpace)
    assert str(sandbox.devices.table.disks[0].path) in str(sandbox.death.result())
    await sandbox.close()


# -- clones


async def test_a_clone(stage: Stage) -> None:
    sandbox = await stage.open(stage.plan(template=True, mem_mib=512))
    builder, clone = stage.vmm.machines
    assert builder.said == ["run", "save", "stop"]
    assert clone.said == ["load", "attach share kataShared", "attach disk root-1", "attach memory 0", "run"]
    record = stage.record
    assert (record.template != "", record.mem_mib, record.devices.plugged_mib) == (True, 512, 256)
    await sandbox.close()


@pytest.mark.parametrize(
    "break_it",
    [
        vmm_fails("load", VmmRefused("another machine")),
        vmm_fails("attach memory 0", VmmRefused("no memory")),
        lambda stage: setattr(stage.vmm, "memory_refusal", "status 1"),
        agent_refuses("ReseedRandomDev"),
    ],
    ids=["state", "memory", "the guest refuses memory", "agent"],
)
async def test_a_clone_that_does_not_work_boots(break_it: Callable[[Stage], None], stage: Stage) -> None:
    break_it(stage)
    sandbox = await stage.open(stage.plan(template=True, mem_mib=512))
    assert len(stage.vmm.machines) == 3
    assert "load" not in stage.vmm.vm.said
    record = stage.record
    assert (record.template, record.mem_mib, record.devices.dimms) == ("", 512, ())
    await sandbox.close()


async def test_a_template_that_cannot_be_made_is_no_reason_not_to_boot(stage: Stage) -> None:
    stage.vmm.fails["save"] = VmmRefused("cannot save")
    sandbox = await stage.open(stage.plan(template=True))
    assert stage.record.template == ""
    assert len(stage.vmm.machines) == 2
    await sandbox.close()


# -- records


def test_a_record_of_a_former_version_has_no_devices(stage: Stage) -> None:
    record = SandboxRecord("s1", created_at=1.0, supervisor_pid=1, boot_id="b")
    fields = msgspec.json.decode(msgspec.json.encode(record))
    del fields["devices"]
    assert msgspec.json.decode(msgspec.json.encode(fields), type=SandboxRecord) == record
    assert record.devices == DeviceTable()


def test_a_plan_names_its_machine(stage: Stage) -> None:
    assert replace(stage.plan()).describe().startswith("1 vCPUs\n256 MiB\n")
