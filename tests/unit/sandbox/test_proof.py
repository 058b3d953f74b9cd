"""The accelerator's choice: what is forced, what is remembered, and for how long."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from msgspec.structs import replace

from katapod.host.facts import HostFacts
from katapod.model.config import Config
from katapod.model.errors import DeviceMissing, KatapodError, MissingProgram, UsageError
from katapod.model.layout import Layout
from katapod.model.record import SandboxRecord
from katapod.plan.virtiofsd import VirtiofsdImplementation, VirtiofsdPlan
from katapod.sandbox import proof, proof_file
from katapod.sandbox.errors import AgentFailed, GuestHangs
from katapod.sandbox.failures import doubting, refuse_second_try, watch_doubts
from katapod.sandbox.planning import SandboxPlan
from katapod.sandbox.proof import BootNotProven, choose_accelerator, kept_choice, wanted_accelerator
from katapod.sandbox.template_store import TemplateHangs
from katapod.vmm.errors import VmmFailed
from katapod.vmm.judge import BootFailure
from katapod.vmm.proof import AcceleratorChoice
from katapod.vmm.protocol import Vmm
from katapod.vmm.spec import Accelerator, CpuRemedy, VmSpec
from kit import accel

FACTS = HostFacts(cpus=2, mem_mib=4096, kvm=False, vhost_vsock=False, boot_id="boot-1", kernel_release="6.1")
WITH_KVM = replace(FACTS, kvm=True)
MSR = BootFailure(said="qemu-system-x86_64: error: failed to set MSR 0x10a to 0x69", status=-6)
HANG = BootFailure(timed_out_s=10.0)
SHORT = BootFailure(said="failed to initialize kvm: Cannot allocate memory", status=1)


class Host:
    """A directory with the files of a guest; `fails` says how a boot ends (None: well)."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.proofs = root / "cache" / "accelerator.json"
        self.layout = Layout(proof_file=self.proofs)
        for name in ("kernel", "initrd", "qemu"):
            (root / name).write_text(name)
        self.config = msgspec.structs.replace(
            Config(),
            qemu=msgspec.structs.replace(
                Config().qemu, path=str(root / "qemu"), kernel=str(root / "kernel"), initrd=str(root / "initrd")
            ),
        )
        self.booted: list[tuple[VmSpec, float]] = []
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(proof, "instructions_a_second", lambda: None)  # whatever this host has
        monkeypatch.setattr(proof, "LADDER", (Accelerator.KVM, Accelerator.TCG))  # test_ladder.py has the whole

    def boots(self, fails: Callable[[VmSpec], BootFailure | None]) -> None:
        async def prove(vm: VmSpec, *, limit_s: float, scratch_parent: Path | None = None, vmm: Vmm) -> None:
            self.booted.append((vm, limit_s))
            await asyncio.sleep(0.05)
            failure = fails(vm)
            if failure is not None:
                raise BootNotProven("cannot boot", replace(failure, timed_out_s=failure.timed_out_s and limit_s))

        self._monkeypatch.setattr(proof, "prove_machine", prove)

    async def choose(self, wanted: str = "auto", facts: HostFacts = FACTS, *, again: bool = False) -> AcceleratorChoice:
        return await choose_accelerator(wanted, self.config, facts, self.proofs, self.root, again=again)

    def kept(self, facts: HostFacts = WITH_KVM) -> AcceleratorChoice | None:
        return kept_choice(self.config, facts, self.proofs)

    def pass_time(self, seconds: float) -> None:
        later = proof_file.now() + seconds
        self._monkeypatch.setattr(proof_file, "now", lambda: later)
        self._monkeypatch.setattr(proof, "now", lambda: later)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch)


async def test_emulation_that_is_forced_proves_nothing(host: Host) -> None:
    assert await host.choose("tcg") == AcceleratorChoice(Accelerator.TCG, "forced", fresh=False)
    assert not host.proofs.exists()


async def test_kvm_that_is_forced_is_proven_and_never_becomes_emulation(host: Host) -> None:
    with pytest.raises(DeviceMissing, match="cannot use KVM: /dev/kvm does not answer"):
        await host.choose("kvm")
    host.boots(lambda vm: HANG)
    with pytest.raises(DeviceMissing, match=r"cannot use KVM: .* did not finish booting within 45 s") as caught:
        await host.choose("kvm", WITH_KVM)
    assert "--accel tcg" in caught.value.hint
    assert [limit_s for _, limit_s in host.booted] == [45.0], "one limit: that of the guest's boot"
    host.boots(lambda vm: None)  # mended since: who forces it need not wait
    assert (await host.choose("kvm", WITH_KVM)).accelerator is Accelerator.KVM
    host.booted.clear()
    assert (await host.choose("kvm", WITH_KVM)).accelerator is Accelerator.KVM
    assert host.booted == []


async def test_a_verdict_is_told_once_and_kept(host: Host) -> None:
    first = await host.choose()
    assert (first.accelerator, first.reason, first.fresh) == (Accelerator.TCG, "this host has no /dev/kvm", True)
    assert not (await host.choose()).fresh


async def test_what_is_named_is_not_told(host: Host) -> None:
    host.boots(lambda vm: None)
    assert not (await host.choose("kvm", WITH_KVM)).fresh


async def test_a_kept_choice_can_be_looked_at_and_asked_for_again(host: Host) -> None:
    assert host.kept(FACTS) is None
    first = await host.choose()
    kept = host.kept(FACTS)
    assert kept is not None
    assert (kept.accelerator, kept.reason) == (first.accelerator, first.reason)
    assert host.kept(replace(FACTS, boot_id="boot-2")) is None
    assert (await host.choose(again=True)).fresh


async def test_another_boot_another_image_another_verdict(host: Host) -> None:
    host.boots(lambda vm: None)
    await host.choose(facts=WITH_KVM)
    later = replace(WITH_KVM, boot_id="boot-2")
    assert (await host.choose(facts=later)).fresh
    assert not (await host.choose(facts=later)).fresh
    (host.root / "new").write_text("rebuilt")
    (host.root / "new").replace(host.root / "initrd")
    assert (await host.choose(facts=later)).fresh


async def test_a_host_without_kvm_is_told_so_once_whatever_is_run(host: Host) -> None:
    assert (await host.choose()).fresh
    host.config = msgspec.structs.replace(
        host.config, qemu=msgspec.structs.replace(host.config.qemu, cpu_features="vmx=off")
    )
    assert not (await host.choose()).fresh


def test_the_flag_the_environment_the_file(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KATAPOD_ACCELERATOR", raising=False)
    assert wanted_accelerator(host.config) == "auto"
    monkeypatch.setenv("KATAPOD_ACCELERATOR", "tcg")
    assert (wanted_accelerator(host.config), wanted_accelerator(host.config, "kvm")) == ("tcg", "kvm")
    monkeypatch.setenv("KATAPOD_ACCELERATOR", "fast")
    with pytest.raises(UsageError, match="KATAPOD_ACCELERATOR=fast: it must be auto, kvm, uml or tcg"):
        wanted_accelerator(host.config)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"boot_id": "boot-1", "choices": {"KEY": ["tcg", "x"]}}'])
async def test_a_spoilt_file_is_no_obstacle(host: Host, text: str) -> None:
    await host.choose()
    key = next(iter(msgspec.json.decode(host.proofs.read_bytes())["choices"]))
    host.proofs.write_text(text.replace("KEY", key))
    assert (await host.choose()).accelerator is Accelerator.TCG


async def test_a_place_that_cannot_be_written_is_no_obstacle(host: Host) -> None:
    (host.root / "cache").write_text("a file")
    assert (await host.choose()).fresh
    assert (await host.choose()).fresh


async def test_a_host_without_qemu_is_no_verdict_on_kvm(host: Host) -> None:
    """A missing program, a full disk: they say nothing about KVM, and must not be remembered as if they did."""
    with pytest.raises(MissingProgram, match=r"cannot run .*/qemu"):  # it is there, but not executable
        await host.choose(facts=WITH_KVM)
    assert not host.proofs.exists()


async def test_a_kvm_that_interprets_boots_nothing(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "instructions_a_second", lambda: 0.9e6)
    host.boots(lambda vm: None)
    choice = await host.choose(facts=WITH_KVM)
    assert (choice.accelerator, choice.fresh) == (Accelerator.TCG, True)
    assert choice.reason == "/dev/kvm opens, but interprets the guest: 0.9 million instructions a second"
    host.pass_time(10 * 3600)
    assert (await host.choose(facts=WITH_KVM)).reason == choice.reason, "it is not tried again before the reboot"
    assert host.booted == []
    assert (await host.choose("kvm", WITH_KVM)).accelerator is Accelerator.KVM, "who forces it has it tried"


async def test_a_kvm_that_runs_is_booted(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "instructions_a_second", lambda: 1e9)
    host.boots(lambda vm: None)
    assert (await host.choose(facts=WITH_KVM)).accelerator is Accelerator.KVM
    assert len(host.booted) == 1


async def test_starts_at_the_same_time_find_out_once(host: Host) -> None:
    host.boots(lambda vm: None)
    choices = await asyncio.gather(*(host.choose(facts=WITH_KVM) for _ in range(6)))
    assert {choice.accelerator for choice in choices} == {Accelerator.KVM}
    assert [choice.fresh for choice in choices].count(True) == 1
    assert len(host.booted) == 1


async def test_those_who_force_kvm_at_the_same_time_learn_of_one_failure(host: Host) -> None:
    host.boots(lambda vm: HANG)
    outcomes = await asyncio.gather(*(host.choose("kvm", WITH_KVM) for _ in range(6)), return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {DeviceMissing}
    assert len(host.booted) == 1


async def test_a_time_out_is_tried_again_later_and_no_sooner(host: Host) -> None:
    host.boots(lambda vm: HANG)
    first = await host.choose(facts=WITH_KVM)
    assert first.accelerator is Accelerator.TCG
    assert "KVM is tried again after 10 min" in first.describe()
    tried = len(host.booted)
    assert not (await host.choose(facts=WITH_KVM)).fresh
    assert len(host.booted) == tried
    host.pass_time(proof_file.FIRST_RETRY_S + 1)
    second = await host.choose(facts=WITH_KVM)
    assert second.fresh
    assert "KVM is tried again after 20 min" in second.describe()
    host.pass_time(2 * proof_file.FIRST_RETRY_S + 1)
    host.boots(lambda vm: None)
    assert (await host.choose(facts=WITH_KVM)).accelerator is Accelerator.KVM


async def test_only_one_start_waits_for_what_is_tried_again(host: Host) -> None:
    host.boots(lambda vm: HANG)
    await host.choose(facts=WITH_KVM)
    host.pass_time(proof_file.FIRST_RETRY_S + 1)
    host.booted.clear()
    host.boots(lambda vm: None)
    choices = await asyncio.gather(*(host.choose(facts=WITH_KVM) for _ in range(4)))
    assert sorted(choice.accelerator.value for choice in choices) == ["kvm", "tcg", "tcg", "tcg"]


async def test_a_time_out_does_not_take_the_place_of_a_success(host: Host) -> None:
    host.boots(lambda vm: None)
    await host.choose(facts=WITH_KVM)
    host.boots(lambda vm: HANG)
    assert (await host.choose(facts=WITH_KVM, again=True)).accelerator is Accelerator.TCG
    assert (await host.choose(facts=WITH_KVM)).accelerator is Accelerator.KVM
    host.boots(lambda vm: MSR)
    await host.choose(facts=WITH_KVM, again=True)
    assert (await host.choose(facts=WITH_KVM)).accelerator is Accelerator.TCG, "what KVM itself refuses does"


async def test_a_guest_that_hangs_need_not_be_tried_with_each_parameter(host: Host) -> None:
    host.boots(lambda vm: HANG)
    await host.choose(facts=WITH_KVM)
    host.booted.clear()
    plain = host.config
    host.config = msgspec.structs.replace(plain, qemu=msgspec.structs.replace(plain.qemu, kernel_params="quiet"))
    assert (await host.choose(facts=WITH_KVM)).accelerator is Accelerator.TCG
    assert host.booted == []
    host.config = msgspec.structs.replace(plain, qemu=msgspec.structs.replace(plain.qemu, cpu_features="vmx=off"))
    host.boots(lambda vm: None)
    assert (await host.choose(facts=WITH_KVM)).accelerator is Accelerator.KVM, "a setting of KVM's is proven anew"


async def test_a_shortage_is_no_verdict(host: Host) -> None:
    host.boots(lambda vm: SHORT)
    choice = await host.choose(facts=WITH_KVM)
    assert choice.accelerator is Accelerator.TCG
    assert "Cannot allocate memory" in choice.reason
    assert "next start" in choice.advice
    assert len(host.booted) == 1, "no remedy helps"
    assert host.kept() is None
    host.boots(lambda vm: None)
    assert (await host.choose(facts=WITH_KVM)).accelerator is Accelerator.KVM


async def test_a_shortage_of_our_own_is_none_either(host: Host) -> None:
    def too_many(vm: VmSpec) -> BootFailure | None:
        raise OSError(24, "Too many open files")

    host.boots(too_many)
    assert "Too many open files" in (await host.choose(facts=WITH_KVM)).reason
    assert host.kept() is None


async def test_the_remedy_that_works_is_used_kept_and_told(host: Host) -> None:
    host.boots(lambda vm: None if "arch-capabilities=off" in vm.remedy.features else MSR)
    found = await host.choose(facts=WITH_KVM)
    assert (found.accelerator, found.remedy) == (Accelerator.KVM, CpuRemedy("arch-capabilities=off"))
    assert "failed to set MSR 0x10a" in found.reason
    assert 'cpu_features = "pmu=off,arch-capabilities=off"' in found.advice
    again = await host.choose(facts=WITH_KVM)
    assert (again.remedy, again.said, again.key) == (found.remedy, found.said, found.key)
    assert again.said.endswith("failed to set MSR 0x10a to 0x69")


async def test_the_reason_is_kept_in_qemus_words(host: Host) -> None:
    host.boots(lambda vm: MSR)
    await host.choose(facts=WITH_KVM)
    kept = host.kept()
    assert kept is not None
    assert kept.reason == (
        "/dev/kvm opens, but the guest image does not boot under it: "
        "QEMU said: error: failed to set MSR 0x10a to 0x69; "
        "with arch-capabilities=off: QEMU said: error: failed to set MSR 0x10a to 0x69; "
        f"with -cpu {host.booted[-1][0].remedy.model}: QEMU said: error: failed to set MSR 0x10a to 0x69"
    )
    assert "ignore_msrs" in kept.advice
    assert "failed to set MSR 0x10a" in host.proofs.read_text()


def test_on_a_machine_without_guest_images_the_tests_know_of_no_boot(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    none = str(host.root / "none")
    without = msgspec.structs.replace(
        host.config,
        qemu=msgspec.structs.replace(host.config.qemu, kernel=none),
        uml=msgspec.structs.replace(host.config.uml, kernel=none, image=none),
    )
    monkeypatch.setattr(accel, "load_config", lambda: SimpleNamespace(config=without))
    assert accel._proven() == {}


# -- a choice that turns out wrong


def plan_with(key: str, accelerator: Accelerator = Accelerator.KVM) -> SandboxPlan:
    vm = VmSpec("s1", "u", "/qemu", Path("/k"), Path("/i"), accelerator, 256, 512, 1, 1, Path("/vm"))
    return SandboxPlan(
        record=SandboxRecord("s1", created_at=1.0, supervisor_pid=1, boot_id="boot-1"),
        vm=vm,
        virtiofsd=VirtiofsdPlan("/v", VirtiofsdImplementation.C, Path("/s"), "auto"),
        hostname="h",
        dns=(),
        shm_size_bytes=1,
        agent_timeout_s=1.0,
        proof_key=key,
    )


@pytest.mark.parametrize(
    ("error", "dropped"),
    [
        (GuestHangs("the guest does not boot"), True),
        (AgentFailed("the guest stopped before its agent answered"), True),
        (VmmFailed("QEMU ended: error: kvm run failed Bad address", returncode=1), True),
        (VmmFailed("cannot start QEMU: exit status 1: Cannot allocate memory", returncode=1), False),
        (VmmFailed("QEMU ended unexpectedly: killed", returncode=-9), False),
        (KatapodError("cannot mount /x"), False),
    ],
)
async def test_a_verdict_goes_when_a_start_fails_as_under_a_broken_kvm(
    host: Host, error: KatapodError, dropped: bool
) -> None:
    host.boots(lambda vm: None)
    choice = await host.choose(facts=WITH_KVM)
    with pytest.raises(type(error)), doubting(plan_with(choice.key), host.layout):
        raise error
    assert ("finds out again" in error.hint) is dropped
    assert (host.kept() is None) is dropped


async def test_a_verdict_goes_when_a_machine_dies_of_kvm(host: Host) -> None:
    host.boots(lambda vm: None)
    choice = await host.choose(facts=WITH_KVM)
    death: asyncio.Future[KatapodError] = asyncio.get_running_loop().create_future()
    watch_doubts(plan_with(choice.key), host.layout, death)
    death.set_result(VmmFailed("QEMU ended: error: kvm run failed Bad address", returncode=1))
    await asyncio.sleep(0)
    assert host.kept() is None


def test_a_guest_that_hangs_under_kvm_gets_no_second_limit() -> None:
    with pytest.raises(GuestHangs, match=r"does not boot: cannot make .* within 45 s \(dial_timeout\)"):
        refuse_second_try(
            plan_with("k"), TemplateHangs("cannot make a template in /t: its guest did not boot within 45 s")
        )
    with pytest.raises(GuestHangs, match="does not wake"):
        refuse_second_try(plan_with("k"), GuestHangs("does not wake"))
    refuse_second_try(plan_with("k", Accelerator.TCG), GuestHangs("slow"))
    refuse_second_try(plan_with("k"), AgentFailed("another failure"))
