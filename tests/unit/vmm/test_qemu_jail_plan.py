"""The jail of a QEMU as a value."""

import os
from pathlib import Path

import pytest
from msgspec.structs import replace
from test_qemu_command_line import SPEC

from katapod.plan.jail import Access, Bind, JailPlan, Node
from katapod.vmm.qemu.command_line import QemuOptions, plan_qemu
from katapod.vmm.qemu.jail import HostFiles, look_at_host, plan_jail
from katapod.vmm.qemu.jail_calls import QEMU_CALLS, QEMU_CALLS_WITH_IO_URING
from katapod.vmm.qemu.system_calls import CALLS
from katapod.vmm.spec import Accelerator, VmSpec

UID = 0x70000001
HOST = HostFiles(
    program=Path("/usr/bin/qemu-system-x86_64"),
    libraries={"/lib": Path("/usr/lib"), "/usr/lib": Path("/usr/lib")},
    data=(Path("/usr/share/qemu"), Path("/usr/lib/ipxe")),
    sources={},
    own_nodes=frozenset(),
    devices=frozenset({Path("/dev/urandom")}),
)


def jail_of(spec: VmSpec, host: HostFiles = HOST) -> JailPlan:
    return plan_jail(plan_qemu(replace(spec, uid=UID)), host)


def test_what_it_finds_of_the_host() -> None:
    kernel, initrd = Path(SPEC.kernel), Path(SPEC.initrd)
    assert set(jail_of(SPEC).binds) == {
        Bind(Path("/usr/lib"), "/lib", Access.EXECUTE),
        Bind(Path("/usr/lib"), "/usr/lib", Access.EXECUTE),
        Bind(Path("/usr/share/qemu"), "/usr/share/qemu"),
        Bind(Path("/usr/bin/qemu-system-x86_64"), "/usr/bin/qemu-system-x86_64", Access.EXECUTE),
        Bind(Path("/dev/null"), "/dev/null", Access.DEVICE),
        Bind(Path("/dev/urandom"), "/dev/urandom", Access.DEVICE),
        Bind(Path("/proc/self/fd"), "/dev/fd"),
        Bind(kernel, str(kernel)),
        Bind(initrd, str(initrd)),
    }
    assert [tmpfs.target for tmpfs in jail_of(SPEC).tmpfs] == [str(SPEC.vm_dir)]


def test_it_may_do_nothing_and_has_no_network_of_its_own() -> None:
    jail = jail_of(SPEC)
    assert (jail.uid, jail.capabilities, jail.netns, jail.calls) == (UID, frozenset(), None, QEMU_CALLS)
    assert not any(bind.access is Access.WRITE for bind in jail.binds)


def test_a_clone_has_no_kernel() -> None:
    targets = {bind.target for bind in jail_of(replace(SPEC, restored=True)).binds}
    assert targets == {bind.target for bind in jail_of(SPEC).binds} - {str(SPEC.kernel), str(SPEC.initrd)}


def test_kvm_is_a_node_of_its_own_where_not_everybody_may_open_it() -> None:
    spec, kvm = replace(SPEC, accelerator=Accelerator.KVM), Path("/dev/kvm")
    for_all = replace(HOST, devices=HOST.devices | {kvm})
    assert Bind(kvm, "/dev/kvm", Access.DEVICE) in jail_of(spec, for_all).binds
    jail = jail_of(spec, replace(for_all, own_nodes=frozenset({kvm})))
    assert jail.nodes == (Node(kvm, "/dev/kvm"),)
    assert "/dev/kvm" not in {bind.target for bind in jail.binds}
    assert "/dev/kvm = a device node like /dev/kvm, its own" in jail.describe()


def test_files_keep_their_names_and_each_is_there_once() -> None:
    options = QemuOptions(firmware="/usr/lib/ipxe/own.bin")
    spec = replace(SPEC, kernel=Path("/img/../img/kernel"), initrd=Path("/usr/lib/initrd"), options=options)
    jail = jail_of(spec, replace(HOST, sources={Path("/img/kernel"): Path("/vm/kernel.copy")}))
    targets = [bind.target for bind in jail.binds]
    assert Bind(Path("/vm/kernel.copy"), "/img/kernel") in jail.binds
    assert "-kernel /img/kernel\n" in plan_qemu(spec).describe()
    assert not {"/usr/lib/initrd", "/usr/lib/ipxe/own.bin"} & set(targets)  # they are in its libraries


def test_what_only_root_may_read_is_copied(tmp_path: Path) -> None:
    vm_dir = tmp_path / "vm"
    vm_dir.mkdir()
    kernel, initrd = tmp_path / "kernel", tmp_path / "initrd"
    kernel.write_text("kernel")
    initrd.write_text("initrd")
    kernel.chmod(0o644)
    initrd.chmod(0o600)
    plan = plan_qemu(replace(SPEC, kernel=kernel, initrd=initrd, vm_dir=vm_dir))
    found = look_at_host(plan, Path("/bin/sh"))
    assert found.sources == {initrd: vm_dir / "initrd.copy"}
    assert (vm_dir / "initrd.copy").read_text() == "initrd"
    assert (vm_dir / "initrd.copy").stat().st_mode & 0o777 == 0o444
    assert found.devices == {Path("/dev/urandom")}
    assert found.program == Path(os.path.realpath("/bin/sh"))
    assert found.libraries["/lib"] == Path(os.path.realpath("/lib"))


def test_a_qemu_beside_the_distribution_has_its_own_libraries(tmp_path: Path) -> None:
    for name in ("bin", "lib", "share/qemu"):
        (tmp_path / name).mkdir(parents=True)
    program = tmp_path / "bin" / "qemu"
    program.touch()
    plan = plan_qemu(replace(SPEC, restored=True))
    found = look_at_host(plan, program)
    jail = plan_jail(replace(plan, uid=UID), found)
    targets = {bind.target for bind in jail.binds}
    assert {str(tmp_path / "lib"), str(tmp_path / "share/qemu"), str(program)} <= targets


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none"):
        look_at_host(plan_qemu(replace(SPEC, kernel=tmp_path / "none")), Path("/bin/sh"))


def test_the_list_has_what_was_seen_and_nothing_that_reaches_further() -> None:
    rules = {rule.name: rule for rule in QEMU_CALLS.rules}
    assert len(rules) == len(QEMU_CALLS.rules)
    assert {rule.name for rule in CALLS} <= set(rules)
    reaching = {"mount", "unshare", "setns", "ptrace", "clone3", "connect", "bind", "setuid", "chmod", "chown", "bpf"}
    assert not reaching & set(rules)
    assert rules["socket"].values == (1,)
    assert 1 not in rules["prctl"].values  # PR_SET_PDEATHSIG
    assert {rule.name for rule in QEMU_CALLS_WITH_IO_URING.rules} - set(rules) == {
        "io_uring_setup",
        "io_uring_enter",
        "io_uring_register",
    }


def test_io_uring_is_there_for_disks_that_use_it() -> None:
    assert jail_of(replace(SPEC, options=QemuOptions(io_uring=True))).calls == QEMU_CALLS_WITH_IO_URING
