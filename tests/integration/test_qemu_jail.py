"""The jail of QEMU: what one that was taken over can do, and what one that works needs."""

import asyncio
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from netns_helper import ip
from vm_helper import DIALECT, INITRD, QEMU, VIRTIOFSD, needs_vm, threads_of, vm_spec

from katapod.host.guest_memory import copy_memory, new_memory
from katapod.host.netns import in_netns
from katapod.host.taps import IFF_NO_PI, IFF_TAP, IFF_VNET_HDR, _open_queue
from katapod.host.virtiofsd import running_virtiofsd
from katapod.plan.call_filter import CallFilter
from katapod.plan.jail import JailPlan
from katapod.plan.virtiofsd import VirtiofsdPlan
from katapod.vmm.devices import Disk, DiskSettings, Memory, Nic, SharedDirectory
from katapod.vmm.protocol import Channel, VmmLogs
from katapod.vmm.qemu.command_line import FdSlot, QemuPlan, plan_qemu
from katapod.vmm.qemu.control import connected_qemu
from katapod.vmm.qemu.jail import look_at_host, plan_jail
from katapod.vmm.qemu.jail_calls import QEMU_CALLS
from katapod.vmm.qemu.process import QemuProcess, running_qemu
from katapod.vmm.qemu.system_calls import CALLS
from katapod.vmm.spec import Accelerator
from kit.call_recorder import REFUSED_TO_QEMU, Recording, call_names, recording
from kit.jail_probe import answered_calls, assert_jailed, in_jail, outcome, raw
from kit.uids import VM_UID

pytestmark = [*needs_vm, pytest.mark.skipif(not INITRD.exists(), reason="needs a guest image")]


# -- what a QEMU that was taken over can do: our own code in place of the program


@pytest.fixture
def jail(tmp_path: Path) -> JailPlan:
    plan = plan_qemu(vm_spec(tmp_path / "vm"))
    return plan_jail(plan, look_at_host(plan, Path(QEMU)))


def test_calls_that_are_not_listed_are_not_there(jail: JailPlan) -> None:
    made, there = answered_calls(jail, {rule.number for rule in QEMU_CALLS.rules})
    assert made > 250
    assert there == {}


def test_a_qemu_that_was_taken_over_finds_an_empty_host(jail: JailPlan, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of the host")
    secret.chmod(0o666)
    us, new_user, pr_set_pdeathsig = os.getpid(), 0x10000000, 1

    def attempts() -> dict[str, Callable[[], Any]]:
        return {
            "a file of the host": lambda: os.open(secret, os.O_RDONLY),
            "the guest's kernel, to read": lambda: os.open("/var/cache/kata-containers/vmlinuz.container", os.O_RDONLY),
            "the guest's kernel, to write": lambda: os.open("/var/cache/kata-containers/vmlinuz.container", os.O_RDWR),
            "a library, to write": lambda: os.open("/lib/x86_64-linux-gnu/libc.so.6", os.O_RDWR),
            "a program": lambda: os.execv("/bin/sh", ["sh"]),
            "other processes": lambda: os.listdir("/proc"),
            "a file in its root": lambda: os.open("/new", os.O_WRONLY | os.O_CREAT),
            "a socket of the internet": lambda: socket.socket(socket.AF_INET),
            "a socket of netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
            "a vsock": lambda: socket.socket(socket.AF_VSOCK),
            "a socket of somebody": lambda: socket.socket(socket.AF_UNIX).connect("\0somebody"),
            "a process of the host": lambda: os.kill(us, signal.SIGKILL),
            "to trace a process": lambda: raw(101, 16, 2),
            "a user namespace": lambda: raw(56, new_user | 17, 0, 0, 0, 0),
            "to outlive its supervisor": lambda: raw(157, pr_set_pdeathsig, 0, 0, 0, 0),
            "another user": lambda: os.setuid(0),
        }

    said = in_jail(jail, lambda: {name: outcome(action) for name, action in attempts().items()})
    assert said == {
        "a file of the host": "ENOENT",
        "the guest's kernel, to read": "done",
        "the guest's kernel, to write": "EACCES",
        "a library, to write": "EACCES",
        "a program": "ENOENT",
        "other processes": "ENOENT",
        "a file in its root": "EROFS",
        "a socket of the internet": "ENOSYS",
        "a socket of netlink": "ENOSYS",
        "a vsock": "ENOSYS",
        "a socket of somebody": "ENOSYS",
        "a process of the host": "ESRCH",
        "to trace a process": "ENOSYS",
        "a user namespace": "ENOSYS",
        "to outlive its supervisor": "ENOSYS",
        "another user": "ENOSYS",
    }


def test_a_device_that_only_root_may_open_is_there_for_its_user(jail: JailPlan) -> None:
    """As /dev/kvm where nobody has given it to a group."""
    plan = plan_qemu(replace(vm_spec(Path("/run/vc/vm/s1")), entropy_source="/dev/fuse"))
    host = replace(look_at_host(plan, Path(QEMU)), own_nodes=frozenset({Path("/dev/fuse")}))

    def probe() -> list[Any]:
        found = os.stat("/dev/fuse")
        return [found.st_uid, found.st_mode & 0o777, outcome(lambda: os.open("/dev/fuse", os.O_RDWR))]

    assert in_jail(plan_jail(plan, host), probe) == [VM_UID, 0o600, "done"]


# -- the list against what QEMU does


@pytest.fixture
def netns() -> Iterator[Path]:
    name = f"t{os.getpid()}-qjail"
    ip("netns", "add", name)
    try:
        yield Path("/run/netns") / name
    finally:
        ip("netns", "del", name)


def serial_port_opened(vm: QemuProcess) -> "asyncio.Future[Any]":
    return vm.qmp.expect("VSERPORT_CHANGE", lambda data: bool(data.get("open")))


async def test_what_qemu_does_is_listed(tmp_path: Path, netns: Path) -> None:
    """In a jail without the list but with somebody who looks. If this fails: tools/record_system_calls.py."""
    spec = replace(vm_spec(tmp_path / "vm"), memory_is_given=True)
    (tmp_path / "base").write_bytes(bytes(4 << 20))
    (tmp_path / "raw").write_bytes(bytes(4 << 20))
    (tmp_path / "shared").mkdir()
    plan, memory = plan_qemu(spec), new_memory(spec.mem_mib)
    share = SharedDirectory("t", tmp_path / "fs.sock", 1)
    tap = in_netns(netns, lambda: [_open_queue("/dev/net/tun", "tap0", IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)])
    virtiofsd = VirtiofsdPlan(VIRTIOFSD, DIALECT, tmp_path / "shared", "auto")
    with recording(CALLS, REFUSED_TO_QEMU) as done:
        async with (
            running_virtiofsd(virtiofsd, share.socket, tmp_path / "virtiofsd.log"),
            running_qemu(plan, logs_in(tmp_path), given={FdSlot.MEMORY: memory}, netns=netns) as vm,
        ):
            assert_jailed(vm.pid)
            await vm.attach(share)
            await vm.attach(Disk("overlay", tmp_path / "overlay", 2, base=tmp_path / "base"))
            await vm.attach(Nic(0, "02:00:00:00:00:02", 31, queues=tap))
            opened = serial_port_opened(vm)
            await vm.run()
            async with asyncio.timeout(180):
                await opened
            await plug_and_unplug(vm, tmp_path)
            await vm.pause()
            await vm.run()
            await vm.facts(10.0)
            channel = vm.take_channel(Channel.AGENT)
            assert channel is not None
            channel.close()
        async with running_qemu(plan, logs_in(tmp_path), given={FdSlot.MEMORY: memory}) as vm:
            opened = serial_port_opened(vm)
            await vm.run()
            async with asyncio.timeout(180):
                await opened
            await vm.save_state(tmp_path / "state")
        await clone(spec_plan=plan_qemu(replace(spec, restored=True)), memory=memory, directory=tmp_path)
    for fd in (*tap, memory):
        os.close(fd)
    assert not_allowed(done) == {}


def not_allowed(done: Recording, listed: CallFilter = QEMU_CALLS) -> dict[str, list[tuple[int, ...]]]:
    """What was called beyond the list of the jail."""
    rules = {rule.number: rule for rule in listed.rules}
    found = {}
    for number, seen in done.calls.items():
        rule = rules.get(number)
        if rule is None or rule.values:
            wrong = [each for each in seen if rule is None or each[rule.argument] & rule.mask not in rule.values]
            if wrong:
                found[call_names()[number]] = sorted(wrong)[:5]
    return found


def logs_in(directory: Path) -> VmmLogs:
    return VmmLogs(directory / "console.log", directory / "vmm.log")


async def plug_and_unplug(vm: QemuProcess, directory: Path) -> None:
    native = DiskSettings(aio="native", cache_set=True, direct=True)
    disks = [Disk("native", directory / "raw", 4, settings=native), Disk("ro", directory / "raw", 5, read_only=True)]
    for disk in disks:
        await vm.attach(disk)
        await vm.detach(disk)
    await vm.attach(Memory(0, 128))
    await vm.add_vcpus(1)
    assert len(await vm.qmp.execute("query-cpus-fast")) == 2
    assert len(await vm.vcpu_threads()) == threads_of(2, vm.pid)
    os.truncate(directory / "raw", 8 << 20)
    await vm.attach(disks[0])
    await vm.resize_disk("native", 8 << 20)


async def clone(spec_plan: QemuPlan, memory: int, directory: Path) -> None:
    own = new_memory(256)
    try:
        copy_memory(memory, own)
        with (directory / "state").open("rb") as state:
            given = {FdSlot.MEMORY: own, FdSlot.STATE: state.fileno()}
            async with running_qemu(spec_plan, logs_in(directory), given=given) as vm:
                await vm.load_state(state.fileno())
                await vm.run()
    finally:
        os.close(own)


@pytest.fixture
def block_device(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "image").write_bytes(bytes(4 << 20))
    made = subprocess.run(["losetup", "-f", "--show", tmp_path / "image"], capture_output=True, text=True, check=True)
    try:
        yield Path(made.stdout.strip())
    finally:
        subprocess.run(["losetup", "-d", made.stdout.strip()], check=True)


async def test_disks_are_descriptors_and_people_see_their_files(tmp_path: Path, block_device: Path) -> None:
    """Of whoever attaches them: the supervisor, or another process."""
    (tmp_path / "base").write_bytes(bytes(4 << 20))
    past_the_cache = DiskSettings(aio="native", cache_set=True, direct=True)
    async with running_qemu(plan_qemu(vm_spec(tmp_path / "vm")), logs_in(tmp_path)) as vm:
        await vm.attach(Disk("device", block_device, 3, host_device=True, settings=past_the_cache))
        await vm.attach(Disk("overlay", tmp_path / "overlay", 4, base=tmp_path / "base"))
        async with connected_qemu(tmp_path / "vm", 10.0) as control:
            await control.attach(Disk("ro", tmp_path / "base", 5, read_only=True))
            found, missing = await control.facts(10.0)
        assert (found is not None, missing) == (True, [])
        assert found is not None
        assert [(disk.file, disk.backing) for disk in found.disks] == [
            (str(block_device), ""),
            (str(tmp_path / "overlay"), str(tmp_path / "base")),
            (str(tmp_path / "base"), ""),
        ]
        threads = {int(each) for each in os.listdir(f"/proc/{vm.pid}/task")}
        assert {cpu.thread for cpu in found.cpus} <= threads
        assert set(await vm.vcpu_threads()) == {cpu.thread for cpu in found.cpus}


@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="needs /dev/kvm")
async def test_kvm_is_there(tmp_path: Path) -> None:
    """Whether guests boot under it or not, and without the register that a KVM within a VM most often cannot set."""
    spec = replace(vm_spec(tmp_path / "vm"), accelerator=Accelerator.KVM, cpu_features="arch-capabilities=off")
    async with running_qemu(plan_qemu(spec), logs_in(tmp_path)) as vm:
        assert_jailed(vm.pid)
        assert await vm.qmp.execute("query-kvm") == {"enabled": True, "present": True}
        assert sorted(os.listdir(f"/proc/{vm.pid}/root/dev")) == ["fd", "kvm", "null", "urandom"]


async def test_what_is_not_listed_would_be_seen(tmp_path: Path) -> None:
    less = tuple(rule for rule in QEMU_CALLS.rules if rule.name != "memfd_create")
    with recording(less, REFUSED_TO_QEMU) as done:
        async with running_qemu(plan_qemu(vm_spec(tmp_path / "vm")), logs_in(tmp_path)):
            pass
    assert set(not_allowed(done, CallFilter(less))) == {"memfd_create"}


def test_the_list_has_each_call_once_by_its_right_number() -> None:
    numbers = {name: number for number, name in call_names().items()}
    assert {rule.name: rule.number for rule in QEMU_CALLS.rules} == {
        rule.name: numbers[rule.name] for rule in QEMU_CALLS.rules
    }
