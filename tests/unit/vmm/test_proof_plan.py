"""The proof as data: which plans have one answer, what a failure says of KVM, what is tried next."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from katapod.sandbox.vmms import DEFAULT_VMM
from katapod.vmm.judge import BootFailure, Finding, Trial
from katapod.vmm.proof import plan_proof
from katapod.vmm.qemu.command_line import plan_qemu
from katapod.vmm.qemu.judge import advise, advise_setting, explain_trials, judge_failure, next_remedy, words_of
from katapod.vmm.spec import Accelerator, CpuRemedy, VmSpec
from kit.vm_values import SMALL_VM, changed_vm

VM = replace(SMALL_VM, accelerator=Accelerator.KVM, mem_mib=2048, max_mem_mib=8192, vcpus=3)
MSR = (
    "qemu-system-x86_64: error: failed to set MSR 0x10a to 0x69\n"
    "qemu-system-x86_64: ../target/i386/kvm/kvm.c:3183: kvm_buf_set_msrs: Assertion `ret == nmsrs' failed."
)


def keys(vm: VmSpec, *identities: str, initrd: str = "initrd") -> tuple[str, str]:
    plan = plan_proof(DEFAULT_VMM, vm, identities, initrd_identity=initrd)
    return plan.key, plan.scope


@pytest.mark.parametrize(
    "change",
    [
        {"cpu_features": "pmu=off"},
        {"machine_accelerators": "kernel_irqchip=split"},
        {"firmware": "/usr/share/ovmf/OVMF.fd"},
        {"vsock_cid": 7},
        {"iothreads": 1},
        {"seccomp_sandbox": ""},
        {"kernel_params": ("nokaslr",)},
        {"memory_slots": 3},
        {"kernel": Path("/img/other")},
    ],
)
def test_what_changes_the_machine_is_proven_anew(change: dict[str, object]) -> None:
    assert keys(changed_vm(VM, change))[0] != keys(VM)[0]


@pytest.mark.parametrize(
    "change",
    [
        {"sandbox_id": "s2", "uuid": "u", "vm_dir": Path("/elsewhere")},
        {"mem_mib": 256, "vcpus": 1},
        {"hugepages": True, "preallocated": True},
        {"vsock_cid": None},
    ],
)
def test_what_differs_between_sandboxes_is_not(change: dict[str, object]) -> None:
    assert keys(changed_vm(VM, change)) == keys(VM)


def test_files_and_settings_of_the_host_count() -> None:
    assert len({keys(VM), keys(VM, "ignore_msrs=Y"), keys(VM, initrd="rebuilt")}) == 3


def test_guests_hang_alike_whatever_they_are_told() -> None:
    scope = keys(VM)[1]
    assert keys(replace(VM, kernel_params=("x",), max_vcpus=2, max_mem_mib=4096), initrd="other")[1] == scope
    for change in ({"cpu_features": "vmx=off"}, {"machine_accelerators": "hpet=off"}, {"vsock_cid": 3}):
        assert keys(changed_vm(VM, change))[1] != scope


def test_the_proof_boots_the_machine_of_sandboxes() -> None:
    wanted = changed_vm(
        VM, {"cpu_features": "pmu=off", "machine_accelerators": "hpet=off", "firmware": "/bios", "vsock_cid": 9}
    )
    shown = plan_qemu(
        plan_proof(DEFAULT_VMM, wanted, [], initrd_identity="").with_remedy(CpuRemedy("vmx=off"))
    ).describe()
    for part in (
        "-cpu host,pmu=off,vmx=off",
        "q35,sata=off,smbus=off,vmport=off,hpet=off",
        "-bios /bios",
        "vhost-vsock",
    ):
        assert part in shown


@pytest.mark.parametrize(
    ("failure", "finding"),
    [
        (BootFailure(said=MSR, status=-6), Finding.FAILS),
        (BootFailure(said="Assertion failed", status=-11), Finding.FAILS),  # abort(3) of process 1
        (BootFailure(said=MSR, status=1), Finding.FAILS),
        (BootFailure(said="failed to initialize kvm: Permission denied", status=1), Finding.FAILS),
        (BootFailure(said="KVM internal error. Suberror: 1", status=None), Finding.FAILS),
        (BootFailure(console="Kernel panic - not syncing", status=0), Finding.FAILS),
        (BootFailure(timed_out_s=10), Finding.HANGS),
        (BootFailure(said="cannot set up guest memory 'dimm1': Cannot allocate memory", status=1), Finding.PASSING),
        (BootFailure(said="failed to initialize kvm: Cannot allocate memory", status=1), Finding.PASSING),
        (BootFailure(said="ioctl(KVM_CREATE_VM) failed: 16 Device or resource busy", status=1), Finding.PASSING),
        (BootFailure(said="kvm: Too many open files", status=1), Finding.PASSING),
        (BootFailure(said="could not write: No space left on device", status=1), Finding.PASSING),
        (BootFailure(status=-9), Finding.PASSING),
        (BootFailure(said="Property 'host-x86_64-cpu.warp' not found", status=1), Finding.PASSING),
        (BootFailure(said="could not load PC BIOS '/x'", status=1), Finding.PASSING),
        (BootFailure(said="warning: host doesn't support requested feature: CPUID.01H", status=1), Finding.PASSING),
    ],
)
def test_only_what_speaks_of_kvm_counts_against_it(failure: BootFailure, finding: Finding) -> None:
    assert judge_failure(failure) is finding


def follow(said: str, *, vendor: str = "GenuineIntel", planned: str = "pmu=off") -> list[str]:
    """All remedies where each boot fails with the same words."""
    trials = [Trial(CpuRemedy(), BootFailure(said=said, status=-6))]
    while (remedy := next_remedy(trials, cpu_vendor=vendor, planned_features=planned)) is not None:
        trials.append(Trial(remedy, BootFailure(said=said, status=-6)))
    return [str(trial.remedy) for trial in trials[1:]]


@pytest.mark.parametrize(
    ("said", "remedies"),
    [
        (MSR, ["arch-capabilities=off", "-cpu Haswell-noTSX"]),
        ("failed to set MSR 0x480", ["vmx=off", "vmx=off,arch-capabilities=off", "-cpu Haswell-noTSX"]),
        ("failed to set MSR 0x345 to 0x2000", ["arch-capabilities=off", "-cpu Haswell-noTSX"]),  # pmu is off already
        ("", ["arch-capabilities=off", "-cpu Haswell-noTSX"]),
    ],
)
def test_remedies_follow_what_qemu_says_and_end(said: str, remedies: list[str]) -> None:
    assert follow(said) == remedies


def test_the_model_in_place_of_the_hosts_is_of_its_vendor() -> None:
    assert follow("", vendor="AuthenticAMD", planned="arch-capabilities=off") == ["-cpu EPYC"]


def test_qemus_own_words_are_told_with_what_was_tried_and_what_to_set() -> None:
    trials = [
        Trial(CpuRemedy(), BootFailure(said=f"qemu: warning: old\n{MSR}", status=-6)),
        Trial(CpuRemedy("arch-capabilities=off"), BootFailure(timed_out_s=10)),
    ]
    assert explain_trials(trials) == (
        "QEMU said: error: failed to set MSR 0x10a to 0x69; "
        "with arch-capabilities=off: the guest did not finish booting within 10 s"
    )
    assert words_of(trials) == MSR
    assert "ignore_msrs" in advise(trials)
    assert advise_setting(CpuRemedy("arch-capabilities=off"), "pmu=off") == (
        'to set it for good: cpu_features = "pmu=off,arch-capabilities=off" in [hypervisor.qemu]'
    )
    assert advise_setting(CpuRemedy(model="EPYC"), "pmu=off") == ""
    assert "next start" in advise([Trial(CpuRemedy(), BootFailure(said="Cannot allocate memory", status=1))])
