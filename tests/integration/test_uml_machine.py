"""A User-mode Linux machine as a VirtualMachine, with a real kernel and agent in its jail."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from katapod.host.descendants import descendants
from katapod.host.jail_uids import held_uid
from katapod.model.config import Config
from katapod.model.errors import KatapodError, MissingProgram
from katapod.model.layout import UIDS_LOCK
from katapod.model.uid_range import DEFAULT_UIDS
from katapod.rpc.agent import AgentClient
from katapod.rpc.status import RpcError
from katapod.sandbox.agent_link import connect_agent
from katapod.vmm.devices import Disk, Memory, Nic
from katapod.vmm.errors import VmmRefused
from katapod.vmm.protocol import Channel, VmmLogs
from katapod.vmm.spec import Accelerator, VmSpec
from katapod.vmm.uml.control import connected_uml
from katapod.vmm.uml.disk_server import STORAGE_DAEMON
from katapod.vmm.uml.disks import FIRST_SLOT
from katapod.vmm.uml.machine import PANIC, UmlMachine
from katapod.vmm.uml.vmm import Uml
from kit.vm_values import SMALL_VM

UML = Uml()
KERNEL, DISK = UML.guest(Config())

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not DISK.exists(), reason="needs a guest image for User-mode Linux: kata-runtime image build"),
]


@pytest.fixture
def spec(tmp_path: Path) -> VmSpec:
    return replace(
        SMALL_VM,
        accelerator=Accelerator.UML,
        program=str(KERNEL),
        kernel=KERNEL,
        initrd=DISK,
        mem_mib=256,
        vm_dir=tmp_path / "vm",
        vsock_cid=None,
        options=UML.options(Config()),
        kernel_params=(),
    )


@contextlib.asynccontextmanager
async def standing(spec: VmSpec) -> AsyncIterator[UmlMachine]:
    logs = VmmLogs(spec.vm_dir.parent / "console.log", spec.vm_dir.parent / "vmm.log")
    with held_uid(DEFAULT_UIDS, UIDS_LOCK) as uid:
        async with UML.start(replace(spec, uid=uid), logs) as vm:
            assert isinstance(vm, UmlMachine)
            yield vm
        assert processes_of(uid) == []


def processes_of(uid: int) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if entry.isdigit() and os.stat(f"/proc/{entry}").st_uid == uid:
                found.append(int(entry))
    return found


@contextlib.asynccontextmanager
async def running(spec: VmSpec) -> AsyncIterator[tuple[UmlMachine, AgentClient]]:
    """A machine whose agent has answered."""
    async with standing(spec) as vm:
        await vm.run()
        async with asyncio.timeout(180):
            agent = await connect_agent(vm, spec, "the agent")
            try:
                await agent.check(timeout_s=60)
                yield vm, agent
            finally:
                agent.connection.close()


async def test_a_machine_that_never_runs_has_no_process(spec: VmSpec) -> None:
    async with standing(spec) as vm:
        assert (vm.pid, vm.returncode) == (0, None)
        assert vm.take_channel(Channel.DEBUG_CONSOLE) is None
        sock = vm.take_channel(Channel.AGENT)
        assert sock is not None
        sock.close()
        assert vm.take_channel(Channel.AGENT) is None, "it is handed out once"


async def test_what_it_does_not_have_is_refused(spec: VmSpec) -> None:
    async with standing(spec) as vm:
        with pytest.raises(VmmRefused, match="cannot plug 128 MiB"):
            await vm.attach(Memory(0, 128))
        with pytest.raises(KatapodError, match="cannot add vCPUs"):
            await vm.add_vcpus(1)
        with pytest.raises(VmmRefused, match="it does not run yet"):
            await vm.pause()


async def test_a_disk_and_the_end_of_what_serves_it(spec: VmSpec, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(bytes(1 << 20))
    async with standing(spec) as vm:
        assert await vm.attach(Disk("root", tmp_path / "overlay", FIRST_SLOT, base=base)) == "virtio-uml.2"
        assert await vm.attach(Disk("data", base, FIRST_SLOT + 1, read_only=True)) == "virtio-uml.3"
        await vm.run()
        async with asyncio.timeout(180):
            agent = await connect_agent(vm, spec, "the agent")
            await agent.check(timeout_s=60)
            agent.connection.close()
            ours = processes_of(os.stat(f"/proc/{vm.pid}").st_uid)
            daemons = [pid for pid in ours if STORAGE_DAEMON in command_of(pid)]
            assert len(daemons) == 2, "each has its own"
            os.kill(daemons[1], signal.SIGKILL)
            await vm.wait_end()
        assert str(vm.explain_end()).startswith("qemu-storage-daemon ended unexpectedly: killed by SIGKILL")


async def test_what_another_process_may_change(spec: VmSpec, tmp_path: Path) -> None:
    """Interfaces, by the kernel's own console; disks are served by whoever started it."""
    async with running(spec), connected_uml(spec.vm_dir, 5.0) as beside:
        nic, disk = Nic(0, "52:54:00:12:34:56", 1, "tap0"), Disk("data", tmp_path / "data", FIRST_SLOT)
        await beside.attach(nic)
        with pytest.raises(VmmRefused, match="already configured"):
            await beside.attach(nic)
        await beside.detach(nic)
        await beside.detach(nic)  # what is out already is no error
        for work in (beside.attach(disk), beside.detach(disk), beside.resize_disk("data", 1)):
            with pytest.raises(VmmRefused, match="supervisor"):
                await work


async def test_it_is_kept_on_one_cpu(spec: VmSpec) -> None:
    before = os.sched_getaffinity(0)
    async with running(spec) as (vm, _):
        held = {tuple(os.sched_getaffinity(pid)) for pid in descendants(vm.pid)}
        assert len(held) == 1
        assert [len(cpus) for cpus in held] == [1]
    assert os.sched_getaffinity(0) == before


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


async def test_a_kernel_that_is_not_installed(spec: VmSpec) -> None:
    with pytest.raises(MissingProgram) as caught:
        async with standing(replace(spec, program="/none/linux")):
            pass
    assert "user-mode-linux" in caught.value.hint


async def test_agent_console_facts_and_pause(spec: VmSpec) -> None:
    async with running(spec) as (vm, agent):
        assert vm.busy_s() > 0
        found, missing = await vm.facts(5.0)
        assert found is not None
        assert (found.name, found.version, missing) == ("User-mode Linux", kernel_version(), [])

        await vm.pause()
        with pytest.raises(RpcError):
            await agent.check(timeout_s=0.5)
        await vm.run()
        await agent.check(timeout_s=30)


async def test_a_machine_made_ahead_takes_interfaces_while_its_guest_runs(spec: VmSpec) -> None:
    nic = Nic(0, "52:54:00:12:34:56", 1, "tap0")
    async with running(replace(spec, standby=True)) as (vm, agent):
        assert nic.mac not in str(await agent.inspect(30))
        assert await vm.attach(nic) == ""
        assert await vm.settle(nic)
        assert nic.mac in str(await agent.inspect(30))


def kernel_version() -> str:
    return KERNEL.resolve().parent.name.partition("+")[0]


async def test_its_processes_are_a_user_of_their_own(spec: VmSpec) -> None:
    async with running(spec) as (vm, _):
        assert vm.pid in descendants(vm.pid)
        status = Path(f"/proc/{vm.pid}/status").read_text()
        assert "CapEff:\t0000000000000000" in status
        assert "CapBnd:\t0000000000000000" in status
        assert "NoNewPrivs:\t1" in status
        limit = min(16384, int(Path("/proc/sys/kernel/pid_max").read_text()) // 8)
        (line,) = [line for line in Path(f"/proc/{vm.pid}/limits").read_text().splitlines() if "Max processes" in line]
        assert line.split()[2:4] == [str(limit)] * 2
        assert os.stat(f"/proc/{vm.pid}").st_uid in range(DEFAULT_UIDS.first, DEFAULT_UIDS.last + 1)


@pytest.mark.parametrize("victim", ["kernel", "helper"])
async def test_a_kernel_that_is_killed_takes_all_with_it(spec: VmSpec, victim: str) -> None:
    async with running(spec) as (vm, _):
        helpers = [pid for pid in descendants(vm.pid) if pid != vm.pid]
        assert helpers
        if victim == "kernel":
            os.kill(vm.pid, signal.SIGKILL)
            async with asyncio.timeout(180):
                assert await vm.wait_end() == "killed by SIGKILL"
            assert "killed by SIGKILL" in str(vm.explain_end())
        else:  # the guest may live on or not: what counts is that nothing stays (standing)
            os.kill(helpers[0], signal.SIGKILL)


async def test_a_guest_that_panics_is_told_as_what_it_is(spec: VmSpec) -> None:
    broken = replace(spec, kernel_params=("init=/none", "rdinit=/none"))
    async with standing(broken) as vm:
        await vm.run()
        async with asyncio.timeout(180):
            await vm.wait_end()
        assert vm.returncode == PANIC
        said = str(vm.explain_end())
        assert "exit status 127: the guest's kernel panicked: Requested init /none failed" in said


async def test_a_guest_that_reboots_ends(spec: VmSpec) -> None:
    """The kernel would execute itself anew, with devices that are not served any more."""
    async with standing(replace(spec, kernel_params=("init=/usr/bin/busybox", "--", "reboot", "-f"))) as vm:
        await vm.run()
        async with asyncio.timeout(180):
            await vm.wait_end()
