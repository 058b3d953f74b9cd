"""Which sandboxes share a template, and what a clone has of its own."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import fields, replace

from katapod.model.uid_range import UidRange
from katapod.sandbox.vmms import DEFAULT_VMM
from katapod.vmm import template as module
from katapod.vmm.qemu.command_line import plan_qemu
from katapod.vmm.spec import ANY_CID, Accelerator, CpuRemedy, VmSpec
from katapod.vmm.template import TemplateLimits, TemplatePlan, clone_of, plan_template
from kit.vm_values import QEMU_FIELDS, SMALL_VM, changed_vm

WANTED = replace(SMALL_VM, mem_mib=2048, max_mem_mib=4096, vcpus=2)
IDENTITIES = ("qemu:1", "kernel:2", "initrd:3")
ROOT = Path("/run/vc/vm/template")
LIMITS = TemplateLimits(max_age_s=60.0, max_uses=10, unused_s=60.0)

OWN: dict[str, Any] = {
    "uid": 1879048192,
    "uids": UidRange(5000, 5999),
    "sandbox_id": "s2",
    "uuid": "6f1d7f5c-0000-4000-8000-000000000002",
    "vm_dir": Path("/run/vc/vm/s2"),
    "vcpus": 3,
    "mem_mib": 256,
    "memory_is_given": True,
    "translation_cache_mib": 64,
    "restored": True,
    "io_uring": True,
    "standby": True,
    "cgroups": (Path("/sys/fs/cgroup/memory/vc/kata_s2"),),
}
"""What sandboxes of one template may differ in."""

DECISIVE: dict[str, Any] = {
    "program": "/usr/bin/qemu-kiwi",
    "kernel": Path("/img/other"),
    "initrd": Path("/img/other"),
    "accelerator": Accelerator.KVM,
    "max_mem_mib": 8192,
    "memory_slots": 2,
    "max_vcpus": 2,
    "vsock_cid": 77,
    "cpu_features": "x2apic=off",
    "remedy": CpuRemedy("arch-capabilities=off"),
    "machine_accelerators": "kernel_irqchip=on",
    "entropy_source": "/dev/random",
    "seccomp_sandbox": "",
    "kernel_params": ("quiet",),
    "debug": True,
    "debug_console": True,
    "bridges": 2,
    "root_ports": 1,
    "memory_offset_mib": 1024,
    "preallocated": True,
    "hugepages": True,
    "reports_free_pages": False,
    "tsc_khz": 2445400,
    "iothreads": 1,
    "firmware": "/usr/share/ovmf.fd",
    "extra_monitor": "hmp",
}


def template_of(wanted: VmSpec, identities: tuple[str, ...] = IDENTITIES, memory_mib: int = 256) -> TemplatePlan:
    return plan_template(DEFAULT_VMM, wanted, identities, ROOT, LIMITS, mem_mib=memory_mib)


def test_every_field_of_a_vm_is_its_own_or_decisive() -> None:
    """A new field of VmSpec has to be put into one of the two: a wrong clone would come of forgetting it."""
    assert ({field.name for field in fields(VmSpec)} - {"options"}) | QEMU_FIELDS == {*OWN, *DECISIVE}


@pytest.mark.parametrize("field", OWN)
def test_what_sandboxes_of_one_template_may_differ_in(field: str) -> None:
    assert template_of(changed_vm(WANTED, {field: OWN[field]})).key == template_of(WANTED).key


@pytest.mark.parametrize("field", DECISIVE)
def test_what_needs_another_template(field: str) -> None:
    assert template_of(changed_vm(WANTED, {field: DECISIVE[field]})).key != template_of(WANTED).key


def test_any_vsock_is_like_another() -> None:
    first, second = (template_of(replace(WANTED, vsock_cid=cid)) for cid in (77, 78))
    assert first.key == second.key
    assert first.vm.vsock_cid == ANY_CID


def test_contents_of_files_are_decisive() -> None:
    keys = {
        template_of(WANTED).key,
        template_of(WANTED, ("qemu:9", "kernel:2", "initrd:3")).key,
        template_of(WANTED, ("qemu:1", "kernel:2", "initrd:3", "another CPU")).key,
        template_of(WANTED, ()).key,
    }
    assert len(keys) == 4


def test_the_form_of_the_files_is_decisive(monkeypatch: pytest.MonkeyPatch) -> None:
    before = template_of(WANTED).key
    monkeypatch.setattr(module, "FORMAT", module.FORMAT + 1)
    assert template_of(WANTED).key != before


def test_memory_of_the_template() -> None:
    assert template_of(WANTED, memory_mib=512).vm.mem_mib == 512
    assert template_of(WANTED, memory_mib=512).key != template_of(WANTED, memory_mib=256).key
    # never more than is wanted: a clone can grow, not shrink
    assert template_of(replace(WANTED, mem_mib=300), memory_mib=512).vm.mem_mib == 300


def test_the_directory_is_named_by_the_key() -> None:
    plan = template_of(WANTED)
    assert plan.directory == ROOT / plan.key
    assert len(plan.key) == 24
    assert set(plan.key) <= set("0123456789abcdef")
    assert plan.describe().splitlines()[:2] == [f"template {plan.key} in {ROOT}", WANTED.program]


def test_a_clone_is_the_templates_machine_under_its_own_names() -> None:
    plan = template_of(WANTED)
    clone = clone_of(plan, WANTED)
    template_lines = plan_qemu(plan.vm).describe().splitlines()
    clone_lines = plan_qemu(clone).describe().splitlines()
    assert [line.strip() for line in clone_lines if line not in template_lines] == [
        "-name sandbox-s1,debug-threads=on",
        f"-uuid {WANTED.uuid}",
        "-incoming defer",
        "-pidfile /run/vc/vm/s1/pid",
    ]
    gone = [line.strip().split()[0] for line in template_lines if line not in clone_lines]
    assert gone == ["-name", "-uuid", "-kernel", "-initrd", "-append", "-pidfile"]


def test_nothing_of_a_sandbox_is_in_its_template() -> None:
    text = plan_qemu(template_of(replace(WANTED, vsock_cid=77)).vm).describe()
    for own in ("s1", WANTED.uuid, "cid=77", "2048M,"):
        assert own not in text


def test_a_clone_has_the_vsock_of_its_sandbox() -> None:
    wanted = replace(WANTED, vsock_cid=77)
    assert clone_of(template_of(wanted), wanted).vsock_cid == 77


@settings(deadline=None)
@given(st.text("abcdef0123456789", min_size=2, max_size=20), st.integers(1, 4), st.integers(256, 100_000))
def test_names_and_sizes_never_split_templates(name: str, vcpus: int, memory_mib: int) -> None:
    wanted = replace(WANTED, sandbox_id=name, vm_dir=Path("/run/vc/vm") / name, vcpus=vcpus, mem_mib=memory_mib)
    assert template_of(wanted).key == template_of(WANTED).key
    assert template_of(wanted).vm == template_of(WANTED).vm


@pytest.mark.parametrize(
    ("age_s", "uses", "reached"),
    [
        (0.0, 0, False),
        (60.0, 9, False),
        (60.1, 0, True),
        (0.0, 10, True),
        (0.0, 11, True),
        (-0.1, 0, True),  # the clock was set back: nobody knows how old it is
    ],
)
def test_when_a_template_is_worn(age_s: float, uses: int, reached: bool) -> None:
    assert LIMITS.reached(age_s, uses) is reached
