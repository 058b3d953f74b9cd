"""The QEMU command line, word for word: a change of it must be a decision."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from katapod.vmm.qemu.command_line import FdSlot, escape, plan_qemu, render_qemu
from katapod.vmm.qemu.cpu_table import cpu_table
from katapod.vmm.spec import Accelerator
from kit.vm_values import SMALL_VM, changed_vm

SPEC = SMALL_VM

PARAMS = (
    "tsc=reliable no_timer_check rcupdate.rcu_expedited=1 "
    "i8042.direct=1 i8042.dumbkbd=1 i8042.nopnp=1 i8042.noaux=1 noreplace-smp reboot=t cryptomgr.notests "
    "net.ifnames=0 swiotlb=noforce console=ttyS0 quiet panic=1 nr_cpus=4 maxcpus=1 acpi_apic_instance=2 "
    "selinux=0 cgroup_no_v1=all agent.hotplug_timeout=30 memhp_default_state=online "
    "initcall_blacklist=tracer_init_tracefs katapod.fixed_addresses"
)

PARAMS_OF_KVM = PARAMS.replace(" maxcpus=1 acpi_apic_instance=2", "").replace(" katapod.fixed_addresses", "")

TCG_WITH_SERIAL_PORT = f"""\
/usr/bin/qemu-system-x86_64
  -name sandbox-s1,debug-threads=on
  -uuid 6f1d7f5c-0000-4000-8000-000000000001
  -machine q35,sata=off,smbus=off,vmport=off
  -accel tcg
  -cpu max,la57=off,erms=off,fsrm=off
  -chardev socket,id=qmp,fd=<qmp>,server=on,wait=off
  -mon chardev=qmp,mode=control
  -chardev socket,id=qmp2,fd=<qmp2>,server=on,wait=off
  -mon chardev=qmp2,mode=control
  -m 256M,slots=10,maxmem=2048M
  -device pci-bridge,bus=pcie.0,id=pci-bridge-0,chassis_nr=1,shpc=off,addr=2,io-reserve=4K,mem-reserve=2M,pref64-reserve=32M
  -device virtio-serial-pci,id=serial0
  -chardev socket,id=charconsole0,fd=<console>
  -device isa-serial,chardev=charconsole0,id=console0
  -chardev socket,id=charagent0,fd=<agent>
  -device virtserialport,bus=serial0.0,nr=1,chardev=charagent0,id=agent0,name=katapod.agent.0
  -object rng-random,id=rng0,filename=/dev/urandom
  -device virtio-rng-pci,rng=rng0
  -device virtio-balloon-pci,id=balloon0,free-page-reporting=on
  -device vmgenid,guid=auto
  -rtc base=utc,driftfix=slew,clock=host
  -vga none
  -no-user-config
  -nodefaults
  -nographic
  -no-reboot
  -object memory-backend-memfd,id=dimm1,size=256M,share=on
  -numa node,memdev=dimm1
  -kernel /img/vmlinux
  -initrd /img/initrd
  -append {PARAMS}
  -S
  -pidfile /run/vc/vm/s1/pid
  -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
  -smp 1,cores=1,threads=1,sockets=4,maxcpus=4
  -acpitable file=/dev/fd/<cpu-table>"""  # noqa: E501 - as long as QEMU takes it


def changed(before: str, after: str) -> list[str]:
    """What a spec changes in the description, as lines with - and +."""
    old, new = before.splitlines(), after.splitlines()
    return [f"-{line.strip()}" for line in old if line not in new] + [
        f"+{line.strip()}" for line in new if line not in old
    ]


def test_emulated_with_a_serial_port() -> None:
    assert plan_qemu(SPEC).describe() == TCG_WITH_SERIAL_PORT


def test_kvm_with_vsock() -> None:
    spec = replace(SPEC, accelerator=Accelerator.KVM, vsock_cid=77, cpu_features="pmu=off")
    assert changed(TCG_WITH_SERIAL_PORT, plan_qemu(spec).describe()) == [
        "--accel tcg",
        "--cpu max,la57=off,erms=off,fsrm=off",
        "--chardev socket,id=charagent0,fd=<agent>",
        "--device virtserialport,bus=serial0.0,nr=1,chardev=charagent0,id=agent0,name=katapod.agent.0",
        f"--append {PARAMS}",
        "--acpitable file=/dev/fd/<cpu-table>",
        "+-accel kvm",
        "+-global kvm-pit.lost_tick_policy=discard",
        "+-cpu host,pmu=off",
        "+-device vhost-vsock-pci,vhostfd=<vsock>,id=vsock-77,guest-cid=77,bus=pcie.0",
        f"+-append {PARAMS_OF_KVM}",
    ]


def test_an_emulated_guest_is_told_of_the_cpus_that_may_come() -> None:
    assert plan_qemu(SPEC).cpu_table == cpu_table(4)
    assert plan_qemu(replace(SPEC, restored=True)).cpu_table == cpu_table(4)  # as the template had it
    assert " maxcpus=3 acpi_apic_instance=2 " in plan_qemu(replace(SPEC, vcpus=3)).describe()
    for none_may_come in (replace(SPEC, vcpus=4), replace(SPEC, max_vcpus=256)):
        plan = plan_qemu(none_may_come)
        assert (plan.cpu_table, FdSlot.CPU_TABLE in plan.slots, "acpi_apic" in plan.describe()) == (b"", False, False)


def test_debug_console() -> None:
    spec = replace(SPEC, debug_console=True, debug=True, kernel_params=("quiet", "x=y"))
    wanted = PARAMS.replace("quiet", "debug").replace("initcall_blacklist=tracer_init_tracefs", "agent.log=debug")
    assert changed(TCG_WITH_SERIAL_PORT, plan_qemu(spec).describe()) == [
        f"--append {PARAMS}",
        "+-chardev socket,id=chardebug0,fd=<debug-console>",
        "+-device virtserialport,bus=serial0.0,nr=2,chardev=chardebug0,id=debug0,name=katapod.console.0",
        f"+-append {wanted} agent.debug_console agent.debug_console_vport=1026 quiet x=y",
    ]


def test_the_translation_cache_is_bounded_under_emulation_only() -> None:
    assert changed(TCG_WITH_SERIAL_PORT, plan_qemu(replace(SPEC, translation_cache_mib=64)).describe()) == [
        "--accel tcg",
        "+-accel tcg,tb-size=64",
    ]
    assert "tb-size" not in plan_qemu(replace(SPEC, translation_cache_mib=64, accelerator=Accelerator.KVM)).describe()


def test_an_emulated_guest_is_told_the_rate_of_its_time_stamp_counter() -> None:
    assert changed(TCG_WITH_SERIAL_PORT, plan_qemu(replace(SPEC, tsc_khz=2445400)).describe()) == [
        f"--append {PARAMS}",
        f"+-append {PARAMS.replace('katapod.fixed', 'tsc_early_khz=2445400 katapod.fixed')}",
    ]
    assert "tsc_early" not in plan_qemu(replace(SPEC, tsc_khz=2445400, accelerator=Accelerator.KVM)).describe()


@pytest.mark.parametrize("change", [{"max_mem_mib": 256}, {"memory_slots": 0}])
def test_no_room_for_memory_is_asked_for_where_none_can_be_plugged(change: dict[str, int]) -> None:
    assert changed(TCG_WITH_SERIAL_PORT, plan_qemu(changed_vm(SPEC, change)).describe()) == [
        "--m 256M,slots=10,maxmem=2048M",
        "+-m 256M",
    ]


def test_the_seccomp_filter_can_be_left_out() -> None:
    assert "-sandbox" not in plan_qemu(changed_vm(SPEC, {"seccomp_sandbox": ""})).describe()


def test_render_names_descriptors() -> None:
    plan = plan_qemu(SPEC)
    assert plan.slots == (FdSlot.QMP, FdSlot.QMP2, FdSlot.CONSOLE, FdSlot.AGENT, FdSlot.CPU_TABLE)
    arguments = render_qemu(plan, dict(zip(FdSlot, range(7, 17), strict=False)))
    assert arguments[:3] == ["/usr/bin/qemu-system-x86_64", "-name", "sandbox-s1,debug-threads=on"]
    assert f"socket,id=charagent0,fd={7 + list(FdSlot).index(FdSlot.AGENT)}" in arguments
    assert not any("{fd}" in argument for argument in arguments)
    assert arguments[arguments.index("-append") + 1] == PARAMS
    assert "" not in arguments


def test_render_wants_every_descriptor() -> None:
    with pytest.raises(KeyError):
        render_qemu(plan_qemu(SPEC), {FdSlot.QMP: 7})


def test_braces_of_the_user_stay() -> None:
    spec = replace(SPEC, kernel_params=("note={fd}",), entropy_source="/dev/{fd}")
    arguments = render_qemu(plan_qemu(spec), dict(zip(FdSlot, range(7, 17), strict=False)))
    assert f"{PARAMS} note={{fd}}" in arguments
    assert "rng-random,id=rng0,filename=/dev/{fd}" in arguments


@given(st.text(alphabet=st.sampled_from("a,=/"), max_size=20))
def test_an_escaped_value_is_read_back_as_one(value: str) -> None:
    """QEMU's rule (qemu-options, get_opt_value): a doubled comma is a comma, a single one ends the value."""
    read, rest = "", escape(value) + ",next=1"
    while True:
        head, _, rest = rest.partition(",")
        read += head
        if not rest.startswith(","):
            break
        read, rest = read + ",", rest[1:]
    assert (read, rest) == (value, "next=1")


def test_an_entropy_source_with_a_comma() -> None:
    assert "filename=/dev/a,,b" in plan_qemu(replace(SPEC, entropy_source="/dev/a,b")).describe()
