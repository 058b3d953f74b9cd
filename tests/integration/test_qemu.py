"""A real QEMU, stopped before its first instruction: its start, its monitor, its end. Nothing is booted here."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec.structs import replace
from vm_helper import INITRD, needs_vm, resources, settled, vm_spec

from katapod.host.logs import read_tail
from katapod.model.errors import MissingProgram
from katapod.sandbox.recovery import find_leftovers
from katapod.vmm.devices import Disk, Memory, SharedDirectory
from katapod.vmm.errors import VmmFailed, VmmLinkBroken, VmmRefused
from katapod.vmm.protocol import Channel, VmmLogs
from katapod.vmm.qemu import process
from katapod.vmm.qemu.command_line import plan_qemu
from katapod.vmm.qemu.control import connected_qemu
from katapod.vmm.qemu.hotplug import plan_disk, plan_memory, plan_shared_directory, plan_vcpus
from katapod.vmm.qemu.process import QemuProcess, running_qemu
from katapod.vmm.spec import VmSpec
from kit.jail_probe import assert_jailed, script_for_jail
from kit.library import layout_below
from kit.vm_values import changed_vm

pytestmark = [
    *needs_vm,
    pytest.mark.skipif(not INITRD.exists(), reason="needs a guest image"),
    pytest.mark.qemu("QEMU itself"),
]


@pytest.fixture
def spec(tmp_path: Path) -> VmSpec:
    return vm_spec(tmp_path / "vm")


@pytest.fixture
def logs(tmp_path: Path) -> VmmLogs:
    return VmmLogs(tmp_path / "console.log", tmp_path / "vmm.log", limit_bytes=16384)


@pytest.fixture
async def vm_started(spec: VmSpec, logs: VmmLogs) -> AsyncIterator[QemuProcess]:
    async with running_qemu(plan_qemu(spec), logs) as vm:
        yield vm


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def is_gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


async def test_starts_stopped_confined_and_on_our_descriptors(vm_started: QemuProcess) -> None:
    assert (await vm_started.qmp.execute("query-status"))["status"] == "prelaunch"
    assert_jailed(vm_started.pid)
    held = [os.readlink(f"/proc/{vm_started.pid}/fd/{number}") for number in os.listdir(f"/proc/{vm_started.pid}/fd")]
    assert not [path for path in held if "pytest" in path and "vm/pid" not in path]
    assert vm_started.plan.pid_file.read_text().strip() == str(vm_started.pid)


async def test_another_process_connects_beside(vm_started: QemuProcess) -> None:
    """One at a time; what it finds half done it undoes, and what is there stays."""
    await vm_started.attach(Memory(0, 128))
    vm_dir = vm_started.plan.vm_dir
    async with connected_qemu(vm_dir, 10.0) as control:
        hypervisor, missing = await control.facts(10.0)
        assert hypervisor is not None
        assert (hypervisor.plugged_memory, missing) == (128 << 20, [])
        assert await control.settle(Memory(0, 128))
        assert not await control.settle(Memory(1, 128))
        backend = plan_memory(1, 128).steps[0]
        await vm_started.qmp.execute(backend.command, backend.arguments)
        with pytest.raises(VmmRefused):
            await control.attach(Memory(1, 128))
        assert not await control.settle(Memory(1, 128))
        await control.attach(Memory(1, 128))
        with pytest.raises(VmmLinkBroken, match="no greeting in time"):
            async with connected_qemu(vm_dir, 0.2):
                pass
    async with connected_qemu(vm_dir, 10.0) as control:
        assert await control.settle(Memory(1, 128))
    assert (await vm_started.qmp.execute("query-status"))["status"] == "prelaunch"
    await vm_started.stop()
    with pytest.raises(VmmLinkBroken, match="cannot connect to QEMU"):
        async with connected_qemu(vm_dir, 10.0):
            pass


async def test_a_directory_whose_sockets_have_long_paths(tmp_path: Path, logs: VmmLogs) -> None:
    """As that of a build below a long cache directory: the address of a socket has room for 107 bytes."""
    before = resources()
    long = tmp_path / ("d" * 120) / "vm"
    async with running_qemu(plan_qemu(vm_spec(long)), logs) as vm:
        assert (await vm.qmp.execute("query-status"))["status"] == "prelaunch"
        assert (long / "qmp.sock").is_socket()
    await asyncio.sleep(0)
    assert resources() == before


async def test_a_soft_stop_leaves_nothing(spec: VmSpec, logs: VmmLogs) -> None:
    before = resources()
    async with running_qemu(plan_qemu(spec), logs) as vm:
        assert await vm.stop() is True
        assert await vm.stop() is True
    assert is_gone(vm.pid)
    await asyncio.sleep(0)
    assert resources() == before


async def test_the_agent_s_socket_is_handed_over_once(vm_started: QemuProcess) -> None:
    sock = vm_started.take_channel(Channel.AGENT)
    assert sock is not None
    assert vm_started.take_channel(Channel.AGENT) is None
    sock.close()


async def test_a_hanging_qemu_is_killed_within_the_limit(spec: VmSpec, logs: VmmLogs) -> None:
    async with running_qemu(plan_qemu(spec), logs) as vm:
        os.kill(vm.pid, signal.SIGSTOP)
        started = time.monotonic()
        assert await vm.stop() is False
        assert time.monotonic() - started < process.SOFT_STOP_S + 180
    assert is_gone(vm.pid)


async def test_a_killed_qemu_is_told_as_that(vm_started: QemuProcess) -> None:
    waiting = asyncio.create_task(vm_started.qmp.execute("query-status", limit_s=30))
    os.kill(vm_started.pid, signal.SIGKILL)
    async with asyncio.timeout(180):
        assert await vm_started.wait_end() == "killed by SIGKILL"
        assert "QEMU ended unexpectedly: killed by SIGKILL" in str(vm_started.explain_end())
        with pytest.raises(VmmLinkBroken):
            await waiting
        with pytest.raises(VmmLinkBroken):
            await vm_started.qmp.execute("query-status")


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"program": "/bin/false"}, "cannot start QEMU: exit status 1"),
        ({"cpu_features": "nonsense=1"}, "nonsense"),
        ({"kernel": Path("/none/kernel")}, "/none/kernel"),
        ({"mem_mib": 1 << 40}, "cannot start QEMU: exit status 1"),
        ({"machine_accelerators": "warp=on"}, "warp"),
    ],
)
async def test_a_qemu_that_does_not_start(spec: VmSpec, logs: VmmLogs, change: dict[str, object], cause: str) -> None:
    before = resources()
    with pytest.raises(VmmFailed, match=cause) as caught:
        async with running_qemu(plan_qemu(changed_vm(spec, change)), logs):
            pytest.fail("it started")
    assert "-append" in str(caught.value.context["command"])
    await asyncio.sleep(0)
    assert resources() == before


async def test_no_qemu(spec: VmSpec, logs: VmmLogs) -> None:
    with pytest.raises(MissingProgram, match="cannot run /none/qemu") as caught:
        async with running_qemu(plan_qemu(replace(spec, program="/none/qemu")), logs):
            pytest.fail("it started")
    assert "qemu-system-x86" in caught.value.hint


@pytest.mark.parametrize("delay_s", [0.0, 0.005, 0.02, 0.05, 0.1, 0.2])
async def test_a_cancelled_start_leaves_nothing(spec: VmSpec, logs: VmmLogs, delay_s: float) -> None:
    async def start() -> None:
        async with running_qemu(plan_qemu(spec), logs):
            await asyncio.sleep(60)

    before = resources()
    task = asyncio.create_task(start())
    await asyncio.sleep(delay_s)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    def gone() -> bool:
        marks = str(spec.vm_dir).encode()
        return not any(marks in _command_line(pid) for pid in os.listdir("/proc") if pid.isdigit())

    assert await settled(gone)
    assert resources() == before


def _command_line(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


async def test_what_qemu_says_is_kept_within_its_limit(spec: VmSpec, logs: VmmLogs, tmp_path: Path) -> None:
    flood = script_for_jail(
        tmp_path / "odd",
        "i=0; while [ $i -lt 20000 ]; do echo $i and so on >&2; i=$((i+1)); done\necho the end >&2; exit 3",
    )
    with pytest.raises(VmmFailed, match="cannot start QEMU: exit status 3"):
        async with running_qemu(plan_qemu(replace(spec, program=str(flood))), logs):
            pytest.fail("it started")
    assert sum(path.stat().st_size for path in tmp_path.glob("vmm.log*")) <= logs.limit_bytes
    assert read_tail(logs.vmm, max_lines=1).endswith("the end")


async def test_memory_that_does_not_fit_is_taken_back(vm_started: QemuProcess) -> None:
    """The backend comes first: without its removal no second attempt could use the slot's name."""
    qmp = vm_started.qmp
    for _ in range(2):
        with pytest.raises(VmmRefused, match="cannot device_add"):
            await qmp.plug(plan_memory(0, 4096))
    await qmp.plug(plan_memory(0, 256))
    (dimm,) = await qmp.execute("query-memory-devices")
    assert dimm["data"]["size"] == 256 << 20


async def test_a_disk_that_cannot_be_plugged_is_taken_back(vm_started: QemuProcess, tmp_path: Path) -> None:
    qmp, disk = vm_started.qmp, tmp_path / "disk, with = odd name"
    with pytest.raises(VmmRefused, match=r"cannot open .*/disk, with = odd name: No such file"):
        await qmp.plug(plan_disk(Disk("d1", disk, 3)))
    disk.write_bytes(bytes(1 << 20))
    with pytest.raises(VmmRefused, match="cannot blockdev-add"):
        await qmp.plug(plan_disk(Disk("d1", disk, 3, host_device=True)))
    await qmp.plug(plan_disk(Disk("d1", disk, 3, read_only=True)))
    with pytest.raises(VmmRefused, match="cannot device_add"):
        await qmp.plug(plan_disk(Disk("d2", disk, 3, read_only=True)))  # the slot is in use
    nodes = [node["node-name"] for node in await qmp.execute("query-named-block-nodes")]
    assert sorted(nodes) == ["drive-d1", "file-d1"]


async def test_vcpus(vm_started: QemuProcess) -> None:
    qmp = vm_started.qmp
    await qmp.plug(plan_vcpus(await qmp.execute("query-hotpluggable-cpus"), 1))
    assert len(await qmp.execute("query-cpus-fast")) == 2
    with pytest.raises(ValueError, match="has room for 0 more"):
        plan_vcpus(await qmp.execute("query-hotpluggable-cpus"), 1)


async def test_a_share_that_nobody_serves(vm_started: QemuProcess, tmp_path: Path) -> None:
    qmp = vm_started.qmp
    before = {chardev["label"] for chardev in await qmp.execute("query-chardev")}
    with pytest.raises(VmmRefused, match=r"cannot connect to .*/none.sock: No such file"):
        await vm_started.attach(SharedDirectory("kataShared", tmp_path / "none.sock", 1))
    with pytest.raises(VmmRefused, match="cannot chardev-add"):
        await qmp.plug(plan_shared_directory("kataShared", 1))
    assert {chardev["label"] for chardev in await qmp.execute("query-chardev")} == before


OWNER = """
import asyncio, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent)]
from vm_helper import vm_spec
from katapod.vmm.protocol import VmmLogs
from katapod.vmm.qemu.process import running_qemu
from katapod.vmm.qemu.command_line import plan_qemu

async def own(directory):
    async with running_qemu(plan_qemu(vm_spec(directory / "vm")), VmmLogs(directory / "c", directory / "v")) as vm:
        print(vm.pid, flush=True)
        await asyncio.sleep(60)

asyncio.run(own(Path(sys.argv[2])))
"""


def test_qemu_dies_with_its_supervisor(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", OWNER, str(Path(__file__).parent), str(tmp_path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as supervisor:
        assert supervisor.stdout is not None
        child = int(supervisor.stdout.readline())
        assert not is_gone(child)
        supervisor.kill()
    assert asyncio.run(settled(lambda: is_gone(child)))


async def test_a_process_is_known_by_its_directory(tmp_path: Path, logs: VmmLogs) -> None:
    """Below other roots another sandbox may have the same id: it is none of ours to end."""
    ours, theirs = layout_below(tmp_path / "a"), layout_below(tmp_path / "b")
    spec = vm_spec(ours.sandbox("same").vm, "same")
    async with running_qemu(plan_qemu(spec), logs) as vm:
        assert f"process {vm.pid}" in find_leftovers(ours, "same")
        assert find_leftovers(theirs, "same") == []
