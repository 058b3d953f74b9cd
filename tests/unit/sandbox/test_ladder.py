"""Which rung of the ladder a sandbox gets: by what it needs, and by what has been seen to boot."""

from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from katapod.host.facts import HostFacts
from katapod.host.state import StateStore
from katapod.model.config import Config, config_of
from katapod.model.config_keys import TABLES, RuntimeConfig, UmlConfig
from katapod.model.errors import DeviceMissing, HostLacks, MissingProgram, UsageError
from katapod.model.ids import ContainerId
from katapod.model.sizing import ContainerLimits
from katapod.sandbox import proof
from katapod.sandbox.ladder import NO_NEEDS, Needs, lacking, needs_of_config
from katapod.sandbox.opening import _at_once
from katapod.sandbox.planning import default_template
from katapod.sandbox.pod import asked_of_fixed, needs_of, size_of
from katapod.sandbox.proof import BootNotProven, choose_accelerator, likely_choice
from katapod.sandbox.request import SandboxRequest
from katapod.sandbox.vmms import vmm_of
from katapod.vmm.judge import BootFailure
from katapod.vmm.proof import AcceleratorChoice
from katapod.vmm.protocol import Vmm
from katapod.vmm.qemu.vmm import Qemu
from katapod.vmm.spec import Accelerator, VmSpec
from katapod.vmm.uml.plan import UmlOptions
from katapod.vmm.uml.vmm import Uml
from kit.library import layout_below
from kit.vm_values import SMALL_VM

KVM, UML, TCG = Accelerator.KVM, Accelerator.UML, Accelerator.TCG
FACTS = HostFacts(cpus=4, mem_mib=4096, kvm=False, vhost_vsock=False, boot_id="boot-1", kernel_release="6.1")
UML_VM = replace(SMALL_VM, options=UmlOptions(has_disks=True))
PANIC = BootFailure(console="Kernel panic", status=-6)


def test_each_accelerator_has_its_vmm() -> None:
    assert [vmm_of(each).name for each in (KVM, UML, TCG)] == ["QEMU", "User-mode Linux", "QEMU"]


@pytest.mark.parametrize(
    ("needs", "why"),
    [
        (NO_NEEDS, ""),
        (Needs(vcpus=2), "has 1 vCPU at most, and 2 are asked for"),
        (
            Needs(resized=True),
            "adds no memory and no vCPU to a guest that runs, and nobody has said how much memory the pod will need",
        ),
        (
            Needs(disks=True),
            "takes no disks while its guest runs, and a block device or a direct volume may be asked for",
        ),
        (Needs(real_memory=True), "has no huge pages and takes no memory ahead, and that is asked for"),
        (Needs(template=True), "has no templates: its guests boot each time"),
        (Needs(programs_32bit=True), "runs no 32-bit programs, and those are asked for"),
        (Needs(key="kernel of [hypervisor.qemu]"), "takes no notice of kernel of [hypervisor.qemu], which is set"),
    ],
)
def test_what_a_vmm_lacks(needs: Needs, why: str) -> None:
    assert lacking(Uml().capabilities(SMALL_VM), needs) == why
    assert lacking(Qemu().capabilities(SMALL_VM), needs) == ""


class Host:
    """Whose guests boot under the accelerators of `boot`."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        for name in ("qemu", "kernel", "initrd", "linux", "disk"):
            (root / name).touch()
        qemu = msgspec.structs.replace(
            Config().qemu, path=str(root / "qemu"), kernel=str(root / "kernel"), initrd=str(root / "initrd")
        )
        self.config = Config(qemu=qemu, uml=UmlConfig(kernel=str(root / "linux"), image=str(root / "disk")))
        self.boot = {KVM, UML}
        self.lacks: HostLacks | None = None
        self.booted: list[tuple[str, Accelerator]] = []
        monkeypatch.setattr(proof, "instructions_a_second", lambda: None)  # whatever this host has
        monkeypatch.setattr(proof, "prove_machine", self._prove)

    async def _prove(self, vm: VmSpec, *, limit_s: float, scratch_parent: Path | None = None, vmm: Vmm) -> None:
        self.booted.append((vmm.name, vm.accelerator))
        if self.lacks is not None:
            raise self.lacks
        if vm.accelerator not in self.boot:
            raise BootNotProven("cannot boot", PANIC)

    def likely(self, needs: Needs = NO_NEEDS, *, kvm: bool = False) -> tuple[Accelerator, str] | None:
        found = likely_choice(self.config, replace(FACTS, kvm=kvm), self.root / "proofs", needs)
        return (found.accelerator, found.reason) if found is not None else None

    async def choose(self, wanted: str = "auto", needs: Needs = NO_NEEDS, *, kvm: bool = False) -> AcceleratorChoice:
        facts = replace(FACTS, kvm=kvm)
        return await choose_accelerator(wanted, self.config, facts, self.root / "proofs", self.root, needs=needs)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch)


async def test_the_best_that_boots_is_taken_and_lower_ones_are_not_asked(host: Host) -> None:
    assert (await host.choose(kvm=True)).accelerator is KVM
    assert host.booted == [("QEMU", KVM)]


async def test_the_next_is_taken_where_the_best_does_not_work(host: Host) -> None:
    first = await host.choose()
    assert (first.accelerator, first.fresh) == (UML, True)
    assert first.reason == "the guest image boots under User-mode Linux; this host has no /dev/kvm"
    assert host.booted == [("User-mode Linux", UML)]
    again = await host.choose()
    assert (again.accelerator, again.fresh, again.key) == (UML, False, first.key)
    assert len(host.booted) == 1, "its proof is kept"


async def test_emulation_is_what_is_left_with_all_reasons(host: Host) -> None:
    host.boot = set()
    choice = await host.choose()
    assert (choice.accelerator, choice.fresh) == (TCG, True)
    assert choice.reason.startswith("this host has no /dev/kvm; the guest image does not boot under User-mode Linux: ")
    assert not (await host.choose()).fresh


async def test_a_rung_that_cannot_do_what_is_needed_is_passed_over_and_that_is_said(host: Host) -> None:
    await host.choose()
    choice = await host.choose(needs=Needs(vcpus=2))
    assert (choice.accelerator, choice.fresh) == (TCG, True)
    assert "User-mode Linux is not used: it has 1 vCPU at most, and 2 are asked for" in choice.reason
    assert host.booted == [("User-mode Linux", UML)], "nobody asks whether it would boot"
    assert not (await host.choose(needs=Needs(vcpus=2))).fresh, "once"
    assert (await host.choose(needs=Needs(programs_32bit=True))).fresh, "another reason"
    assert (await host.choose()).accelerator is UML, "what one sandbox needs is no verdict"


async def test_without_its_image_it_is_no_rung_and_that_is_said_once(host: Host) -> None:
    (host.root / "disk").unlink()
    choice = await host.choose()
    assert (choice.accelerator, choice.fresh) == (TCG, True)
    assert choice.reason == (
        f"this host has no /dev/kvm; User-mode Linux has no guest image here: {host.root / 'disk'}: "
        "No such file or directory (install the package user-mode-linux, then: kata-runtime image build)"
    )
    assert not (await host.choose()).fresh
    with pytest.raises(DeviceMissing, match="User-mode Linux has no guest image here") as caught:
        await host.choose("uml")
    assert "kata-runtime image build" in caught.value.hint


async def test_what_is_forced_is_refused_where_it_cannot_do_it(host: Host) -> None:
    with pytest.raises(UsageError, match="cannot use User-mode Linux: it has 1 vCPU at most, and 3 are asked for"):
        await host.choose("uml", Needs(vcpus=3))
    assert (await host.choose("uml", Needs(resized=True, disks=True))).accelerator is UML, (
        "refused when it comes to that"
    )


async def test_a_host_without_a_jail_emulates_and_does_not_try_again(host: Host) -> None:
    host.lacks = HostLacks("cannot make a PID namespace: Operation not permitted", hint="grant it")
    choice = await host.choose()
    assert (choice.accelerator, choice.fresh, choice.advice) == (TCG, True, "grant it")
    assert choice.reason.endswith(
        "; User-mode Linux cannot start here: cannot make a PID namespace: Operation not permitted"
    )
    assert not (await host.choose()).fresh
    assert len(host.booted) == 1
    with pytest.raises(HostLacks, match="cannot make a PID namespace"):
        await host.choose("uml")


async def test_a_host_without_qemu_is_told_so(host: Host) -> None:
    host.lacks = MissingProgram("cannot find qemu-system-x86_64")
    with pytest.raises(MissingProgram):
        await host.choose(kvm=True)


async def test_what_a_start_would_use_is_known_without_a_boot_once_it_has_been_found(host: Host) -> None:
    assert host.likely() is None
    await host.choose()
    assert host.likely() == (UML, "the guest image boots under User-mode Linux; this host has no /dev/kvm")
    assert host.likely(Needs(vcpus=2)) == (TCG, "this host has no /dev/kvm")
    assert host.likely(kvm=True) is None
    await host.choose(kvm=True)
    assert host.likely(kvm=True) == (KVM, "the guest image boots under KVM")
    (host.root / "linux").unlink()
    found = host.likely()
    assert found is not None
    assert found[0] is TCG
    assert "User-mode Linux has no guest image here" in found[1]
    assert len(host.booted) == 2


@pytest.mark.parametrize(
    ("table", "key", "value", "named"),
    [
        ("hypervisor.qemu", "kernel", "/boot/mine", "kernel of [hypervisor.qemu]"),
        ("hypervisor.qemu", "kernel_params", "quiet", "kernel_params of [hypervisor.qemu]"),
        ("hypervisor.qemu", "cpu_features", "pmu=off,avx=off", "cpu_features of [hypervisor.qemu]"),
        ("hypervisor.qemu", "default_memory", 512, ""),
        ("hypervisor.qemu", "enable_debug", True, ""),
        ("hypervisor.uml", "kernel_params", "quiet", ""),
        ("agent.kata", "kernel_modules", ("dummy",), "kernel_modules of [agent.kata]"),
        ("katapod", "guest_flavour", "systemd", ""),
    ],
)
def test_a_key_of_which_only_qemu_takes_notice_asks_for_it(table: str, key: str, value: object, named: str) -> None:
    values: dict[str, dict[str, object]] = {each: {} for each in TABLES}
    values[table][key] = value
    assert needs_of_config(config_of(values)) == Needs(key=named)


def test_who_sets_a_key_for_both_asks_for_neither() -> None:
    values: dict[str, dict[str, object]] = {each: {} for each in TABLES}
    values["hypervisor.qemu"]["kernel_params"] = values["hypervisor.uml"]["kernel_params"] = "quiet"
    assert needs_of_config(config_of(values)) == NO_NEEDS


async def test_what_is_forced_and_does_not_boot_never_becomes_another(host: Host) -> None:
    host.boot = set()
    with pytest.raises(DeviceMissing, match="cannot use User-mode Linux: the guest image does not boot under"):
        await host.choose("uml")


POD = SandboxRequest(ContainerId("p1"), "pod", is_pod=True)
GIB = 1 << 30


@pytest.mark.parametrize(("accelerator", "mem_mib", "max_mib"), [(UML, 2048, 2048), (TCG, 256, 4096)])
def test_a_pod_that_cannot_grow_is_whole_from_its_start(accelerator: Accelerator, mem_mib: int, max_mib: int) -> None:
    config = Config()
    small = size_of(POD, config, FACTS, ())
    assert small.mem_mib == 256
    whole = _at_once(POD, config, FACTS, small, accelerator)
    assert (whole.mem_mib, whole.max_mem_mib) == (mem_mib, max_mib)
    fixed = replace(POD, fixed=True, is_pod=False)
    assert _at_once(fixed, config, FACTS, small, accelerator).mem_mib == 256, "its one container has been counted"


@pytest.mark.parametrize(
    ("announced", "static", "resized"),
    [
        (None, False, True),
        (ContainerLimits(), False, False),
        (ContainerLimits(cpus=1.0), False, False),
        (ContainerLimits(memory_bytes=GIB), False, False),
        (None, True, False),
    ],
)
def test_a_pod_whose_memory_is_known_needs_no_more_later(
    announced: ContainerLimits | None, static: bool, resized: bool, tmp_path: Path
) -> None:
    config = Config(runtime=RuntimeConfig(static_sandbox_resource_mgmt=static))
    request = replace(POD, announced=announced)
    needs = needs_of(request, config, size_of(request, config, FACTS, ()), StateStore(layout_below(tmp_path)))
    assert (needs.resized, needs.disks) == (resized, True)
    assert (lacking(Uml().capabilities(UML_VM), needs) == "") is not resized


def test_of_a_guest_that_does_not_grow_only_limits_ask_for_more() -> None:
    none, small = ContainerLimits(), ContainerLimits(memory_bytes=GIB, cpus=0.5)
    assert size_of(POD, Config(), FACTS, (none, small)).mem_mib == 3072, "what one without a limit may use comes on top"
    size = asked_of_fixed(POD, Config(), FACTS, (none, small))
    assert (size.mem_mib, size.vcpus) == (1280, 1)
    both = asked_of_fixed(POD, Config(), FACTS, (none, small, ContainerLimits(memory_bytes=GIB, cpus=1.0)))
    assert (both.mem_mib, both.vcpus) == (2304, 2)


async def test_only_what_has_templates_is_given_one(host: Host) -> None:
    assert default_template(host.config, FACTS, UML) is None
    assert default_template(host.config, FACTS, TCG) is not None
