"""The command line and the jail of a User-mode Linux kernel, as text; how its processes are found again."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from katapod.host.regset import REGSET
from katapod.vmm.devices import Nic
from katapod.vmm.errors import VmmRefused
from katapod.vmm.processes import is_vm
from katapod.vmm.spec import Accelerator, VmSpec
from katapod.vmm.uml.disks import DEVICES_BEFORE, DISKS_MAX
from katapod.vmm.uml.plan import FdSlot, UmlOptions, argv0_of, plan_jail, plan_uml, processes_on, render_uml
from katapod.vmm.uml.vmm import Uml
from kit.vm_values import SMALL_VM

VM = replace(
    SMALL_VM,
    accelerator=Accelerator.UML,
    program="/img/linux",
    kernel=Path("/img/linux"),
    initrd=Path("/img/disk"),
    mem_mib=512,
    vm_dir=Path("/run/vc/vm/s1"),
    vsock_cid=None,
    kernel_params=("katapod.prove=1",),
    options=UmlOptions(libraries=(Path("/lib/libc.so.6"),), processes=4096),
)
NIC = Nic(0, "52:54:00:12:34:56", 1, "tap0_kata", 9000)

COMMAND = """\
/img/linux
  mem=512M
  ubd0r=/disk
  con=null
  con0=fd:{fd},fd:{fd}
  ssl=null
  umid=vm
  uml_dir=/tmp/
  virtio_uml.device=/sockets/console.sock:3
  virtio_uml.device=/sockets/share.sock:26
  virtio_uml.device=/sockets/balloon.sock:5
  vec0:transport=tap,ifname=tap0_kata,mac=52:54:00:12:34:56,mtu=9000,gro=1
  lpj=30613504
  root=/dev/ubda
  rootfstype=ext4
  ro
  init=/init
  initcall_blacklist=raid6_select_algo,calibrate_xor_blocks,init_hostfs,harddog_miscdev_init,ssl_init,\
init_btrfs_fs,init_xfs_fs,init_jfs_fs,init_zswap
  cryptomgr.notests
  net.ifnames=0
  lsm=yama
  dhash_entries=16384
  ihash_entries=8192
  thash_entries=2048
  pty.legacy_count=0
  cgroup_no_v1=all
  katapod.processes=4096
  agent.hotplug_timeout=30
  quiet
  panic=1
  katapod.prove=1"""


def test_the_command_line() -> None:
    plan = plan_uml(VM, nics=[NIC])
    assert plan.describe() == COMMAND
    assert "con0=fd:7,fd:7" in render_uml(plan, {FdSlot.CONSOLE: 7})


def test_what_only_a_debugged_guest_is_told() -> None:
    told = Uml().kernel_params(replace(VM, debug=True, debug_console=True)).split()
    assert {"debug", "agent.log=debug", "agent.debug_console", "agent.debug_console_vport=1026"} <= set(told)
    assert "quiet" not in told


def test_an_interface_that_cannot_be_named_is_refused() -> None:
    with pytest.raises(VmmRefused, match="cannot attach the tap a,b"):
        plan_uml(VM, nics=[Nic(0, NIC.mac, 1, "a,b")])


def test_the_jail_has_what_the_kernel_needs_and_no_more() -> None:
    jail = plan_jail(plan_uml(VM), 1879048192, None)
    lines = jail.describe().splitlines()
    assert lines[:2] == ["user and group 1879048192, no other groups", "no capability; the bounding set is empty"]
    start = lines.index("root: empty, read-only, with") + 1
    assert lines[start : start + 7] == [
        "  /linux = /img/linux (execute)",
        f"  /libregset.so.1 = {REGSET} (execute)",
        "  /lib/libc.so.6 = /lib/libc.so.6 (execute)",
        "  /disk = /img/disk (read)",
        "  /sockets = /run/vc/vm/s1/sockets (read)",
        "  /proc/cpuinfo = /run/vc/vm/s1/cpuinfo (read)",
        f"  /tmp = tmpfs, {576 << 20} bytes, 1024 files, exec, huge pages",
    ]


def test_only_with_a_network_the_jail_has_the_device_of_taps() -> None:
    netns = Path("/run/netns/n")
    without, with_network = (plan_jail(plan_uml(VM), 7, where).describe() for where in (None, netns))
    assert "/dev/net/tun" not in without
    assert "/dev/net/tun = /dev/net/tun (device)" in with_network, "an interface may come later"
    assert str(netns) in with_network
    standing_by = plan_jail(plan_uml(replace(VM, standby=True)), 7, None).describe()
    assert "/dev/net/tun = /dev/net/tun (device)" in standing_by, "its network comes later"


def test_places_of_disks_are_numbered_as_the_kernel_does() -> None:
    """It counts the virtio devices of its command line."""
    plan = plan_uml(replace(VM, options=UmlOptions(has_disks=True)))
    devices = [text for text in plan.describe().split() if text.startswith("virtio_uml.device=")]
    assert devices[DEVICES_BEFORE] == "virtio_uml.device=/sockets/disk0.sock:2"
    assert len(devices) == DEVICES_BEFORE + DISKS_MAX + 1, "behind them is the balloon"
    assert len(plan.describe()) < 3072, "the kernel takes 4096 bytes, and kernel_params come on top"


def test_its_processes_are_found_by_their_command_lines() -> None:
    command = "\0".join([argv0_of(VM.vm_dir), "mem=512M", ""])
    assert is_vm(command, Path("/run/vc/vm/s1"))
    assert not is_vm(command, Path("/run/vc/vm/s"))
    assert not is_vm(command, Path("/run/vc/vm/s12"))
    assert not is_vm("/usr/bin/less\0/run/vc/vm/s1\0", Path("/run/vc/vm/s1"))


def test_a_description_has_nothing_of_one_machine_only() -> None:
    """It is the identity that proofs are kept under."""

    def described(vm: VmSpec) -> str:
        return Uml().describe(vm)

    assert described(VM) == described(replace(VM, sandbox_id="other", vm_dir=Path("/elsewhere"), uid=7))
    assert described(VM) != described(replace(VM, mem_mib=256))
    assert Uml().describe_for_host(VM) == Uml().describe_for_host(replace(VM, mem_mib=256))


def test_a_machine_leaves_most_process_ids_of_a_small_host_to_others() -> None:
    assert (processes_on(32768), processes_on(1 << 22)) == (4096, 16384)
    plan = plan_uml(VM)
    assert "limits: 4096 processes" in plan_jail(plan, 7, None).describe()
    assert "katapod.processes=4096" in plan.describe(), "the guest's agent has to know of it"


def test_whoever_lacks_disks_is_told_what_serves_them() -> None:
    without, with_disks = (Uml().capabilities(replace(VM, options=UmlOptions(has_disks=has))) for has in (False, True))
    assert (without.disk_slots, without.more_slots) == ((), "install qemu-storage-daemon, package qemu-utils")
    assert (len(with_disks.disk_slots), with_disks.more_slots) == (24, "")
