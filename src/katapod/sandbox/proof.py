"""Accelerator by proof: KVM, or User-mode Linux, is used only where the machine that sandboxes start with has been seen
to boot under it.

/dev/kvm that opens proves nothing: there are hosts where the VMM ends, or where guest kernels hang. The plan of a proof
and what a failure means are vmm/proof.py's, what is kept is proof_file.py's. Here guests are booted.
"""

import asyncio
import contextlib
import errno
import logging
import os
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from katapod.host.facts import HostFacts, cpu_vendor
from katapod.host.kvm_speed import instructions_a_second
from katapod.host.logs import read_tail
from katapod.host.patience import patient_timeout
from katapod.model.config import Config
from katapod.model.errors import DeviceMissing, HostLacks, KatapodError, UsageError
from katapod.model.layout import Layout
from katapod.model.tokens import new_uuid, random_hex
from katapod.sandbox.agent_link import claim_channel, claim_user
from katapod.sandbox.failures import guest_of
from katapod.sandbox.ladder import NO_NEEDS, Needs, lacking
from katapod.sandbox.planning import capabilities_of, proof_for
from katapod.sandbox.proof_file import ProofFile, now, retry_s
from katapod.sandbox.vmms import DEFAULT_VMM, LADDER
from katapod.tasks import beside
from katapod.vmm.errors import VmmFailed, VmmLinkBroken, VmmRefused
from katapod.vmm.judge import BootFailure, Finding, Trial
from katapod.vmm.proof import PROOF_MEM_MIB, RUNGS, AcceleratorChoice, ProofPlan
from katapod.vmm.protocol import Handed, VirtualMachine, Vmm, VmmLogs
from katapod.vmm.spec import NO_REMEDY, Accelerator, CpuRemedy, VmSpec

__all__ = [
    "BootNotProven",
    "NoGuestImage",
    "accelerator_for",
    "choose_accelerator",
    "kept_choice",
    "likely_choice",
    "prove_boot",
    "prove_machine",
    "wanted_accelerator",
    "with_guest",
]

log = logging.getLogger(__name__)

VARIABLE = "KATAPOD_ACCELERATOR"
WANTED = ("auto", *(each.value for each in Accelerator))
FIRST_LIMIT_S = 10.0  # of one boot
INTERPRETED_BELOW = 20e6  # instructions a second: a processor runs a hundred times as many, QEMU's emulation ten times
ALL_LIMIT_S = 15.0  # of one boot and those with remedies
TCG_LIMIT_S = 90.0
TURN_LIMIT_S = 90.0  # for another who finds out: the longest dial_timeout that is in use, and more
SILENCE_S = 10.0  # that is told of a VMM that did not come up
NO_KVM = "this host has no /dev/kvm"
CONSOLE_S = 0.05  # for the console's last bytes
_SHORT_OF = {errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EAGAIN}

Boot = Callable[[VmSpec, float], Awaitable[None]]


class NoGuestImage(DeviceMissing):
    """A rung of the ladder for which no guest image was built."""


class BootNotProven(KatapodError):
    """A guest did not boot to a working agent; `failure` says how."""

    def __init__(self, what: str, failure: BootFailure) -> None:
        super().__init__(what)
        self.failure = failure


async def prove_boot(
    kernel: Path,
    initrd: Path,
    program: str,
    accelerator: Accelerator,
    *,
    limit_s: float,
    scratch_parent: Path | None = None,
    vmm: Vmm = DEFAULT_VMM,
) -> None:
    """Boot a guest image once, in a machine with nothing but a console. As prove_machine."""
    spec = VmSpec(
        sandbox_id="proof",
        uuid=new_uuid(),
        program=program,
        kernel=kernel,
        initrd=initrd,
        accelerator=accelerator,
        mem_mib=PROOF_MEM_MIB,
        max_mem_mib=PROOF_MEM_MIB,
        vcpus=1,
        max_vcpus=1,
        vm_dir=Path("/proof"),
    )
    await prove_machine(spec, limit_s=limit_s, scratch_parent=scratch_parent, vmm=vmm)


async def prove_machine(
    vm: VmSpec, *, limit_s: float, scratch_parent: Path | None = None, vmm: Vmm = DEFAULT_VMM
) -> None:
    """Boot the machine once, until its agent says that all it needs works.

    Its files lie in a new directory below `scratch_parent`, else in the system's temporary directory.
    Raises BootNotProven with the tail of the guest's console and what the VMM said.
    """
    token = random_hex(8)
    with tempfile.TemporaryDirectory(
        prefix="proof-" if scratch_parent else "katapod-proof-", dir=scratch_parent
    ) as scratch:
        directory = Path(scratch)
        spec = replace(
            vm,
            sandbox_id=f"proof-{token}",
            uuid=new_uuid(),
            vm_dir=directory,
            kernel_params=(*vm.kernel_params, f"katapod.prove={token}"),
        )
        logs = VmmLogs(directory / "console.log", directory / "vmm.log")
        try:
            end = await _boot_once(vmm, spec, logs, limit_s)
        except (VmmFailed, VmmRefused, VmmLinkBroken) as exc:
            said = read_tail(logs.vmm, max_lines=10) or str(exc)
            status = exc.returncode if isinstance(exc, VmmFailed) else None
            end = _End(status, SILENCE_S if status is None else 0.0, said, cause=exc)  # None: it hung, or was slow
        console = read_tail(logs.console, max_bytes=16384, max_lines=25)
    if f"katapod-agent: proven {token}" in console:
        return
    failure = BootFailure(said=end.said, console=console, timed_out_s=end.timed_out_s, status=end.status)
    what = f"cannot boot {vm.initrd} with kernel {vm.kernel} under {vm.accelerator.value}"
    if end.cause is not None and not console:
        raise BootNotProven(f"{what}: {end.cause}", failure) from end.cause
    shown = f"\nlast lines of its console:\n{console}" if console else "; its console is silent"
    raise BootNotProven(f"{what}: {vmm.judge.summarize(failure)}{shown}", failure)


class _End(Struct, frozen=True):
    """How a boot of the proof ended."""

    status: int | None  # of the VMM; None: it still runs
    timed_out_s: float
    said: str
    cause: KatapodError | None = None


async def _boot_once(vmm: Vmm, spec: VmSpec, logs: VmmLogs, limit_s: float) -> _End:
    """Raises VmmFailed, VmmRefused, VmmLinkBroken, DeviceMissing."""
    with contextlib.ExitStack() as claims:
        given: dict[Handed, int] = {}
        spec = claim_channel(spec, given, claims)
        spec = claim_user(spec, vmm.capabilities(spec), claims)
        async with vmm.start(spec, logs, given=given) as vm:
            stopped = vm.expect_stop()
            timed_out = 0.0
            try:
                async with patient_timeout(limit_s, vm):
                    with contextlib.suppress(VmmLinkBroken):  # the VMM's own end is the cause, and seen next
                        await vm.run()
                    await _end_or_stop(vm, stopped)
            except TimeoutError:
                timed_out = limit_s
            await asyncio.sleep(CONSOLE_S)
            return _End(vm.returncode, timed_out, read_tail(logs.vmm, max_lines=10))


async def _end_or_stop(vm: VirtualMachine, stopped: "asyncio.Future[Any]") -> None:
    """Until the VMM ends, or stops the guest by itself: KVM gave up then, and the VMM has said why."""
    async with beside(vm.wait_end(), name="wait-proof") as ended:
        await asyncio.wait({ended, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not ended.done() and stopped.exception() is not None:
            await ended  # the link broke a moment before the VMM's end


# long: what is known, and where; by name
async def choose_accelerator(
    wanted: str,
    config: Config,
    facts: HostFacts,
    proof_file: Path,
    scratch_parent: Path,
    *,
    again: bool = False,
    needs: Needs = NO_NEEDS,
) -> AcceleratorChoice:
    """Return the accelerator for `wanted` (auto, kvm, uml, tcg), and what of the plan's CPU has to differ for it.

    `auto` is the first of the ladder that can do what the sandbox needs and boots the guest image. Starts at the same
    time find out once. With `again` a choice that was kept does not count. `scratch_parent` is the caller's to remove:
    nothing of a proof stays even when we are killed. Raises DeviceMissing where an accelerator is forced and does not
    work, UsageError where it lacks what is needed; OSError if a file of the guest is missing.
    """
    if wanted == "tcg":
        return AcceleratorChoice(Accelerator.TCG, "forced", fresh=False)
    trial = _Trial(config, facts, proof_file, scratch_parent, again)
    if wanted != "auto":
        rung = Accelerator(wanted)
        if lack := lacking(capabilities_of(config, facts, rung), needs.now):
            raise UsageError(f"cannot use {RUNGS[rung]}: it {lack}", hint="leave --accel out, or use --accel tcg")
        try:
            found = await _ask(rung, trial, forced=True)
        except NoGuestImage as exc:
            raise DeviceMissing(f"cannot use {RUNGS[rung]}: {exc}", hint=exc.hint) from exc
        return found if found.remedy else replace(found, fresh=False)  # whoever names it need not be told of it
    passed: list[str] = []
    choice = None
    for rung in LADDER:
        if rung is Accelerator.TCG:
            break
        if lack := lacking(capabilities_of(config, facts, rung), needs):
            passed.append(f"{RUNGS[rung]} is not used: it {lack}")
            continue
        try:
            found = await _ask(rung, trial, forced=False)
        except NoGuestImage as exc:
            passed.append(f"{exc} ({exc.hint})")
            continue
        if found.accelerator is rung:
            return found if choice is None else replace(found, reason=f"{found.reason}; {choice.reason}")
        choice = found if choice is None else choice.beside(found)
    fresh = bool(passed) and ProofFile(proof_file, facts.boot_id).tell_once("; ".join(passed))
    if choice is None:
        return AcceleratorChoice(Accelerator.TCG, "; ".join(passed), fresh=fresh)
    return replace(choice, reason="; ".join([choice.reason, *passed]), fresh=choice.fresh or fresh)


class _Trial(Struct, frozen=True):
    """Around a question to a rung of the ladder."""

    config: Config
    facts: HostFacts
    proof_file: Path
    scratch_parent: Path
    again: bool


async def _ask(rung: Accelerator, trial: _Trial, *, forced: bool) -> AcceleratorChoice:
    """Whether it works here: the choice is that accelerator, or emulation with the reason. Raises DeviceMissing where
    it is forced and does not."""
    facts = trial.facts
    if forced and rung is Accelerator.KVM and not facts.kvm:
        raise DeviceMissing(
            "cannot use KVM: /dev/kvm does not answer",
            hint="load kvm_intel or kvm_amd, or let Katapod emulate: --accel tcg",
        )
    plan = _plan(trial.config, facts, rung)
    file, began = ProofFile(trial.proof_file, facts.boot_id), now()
    kept = None if trial.again else _standing(file, plan, forced=forced)
    if kept is not None:
        return kept
    overdue = file.find(plan) if not forced and not trial.again else None
    async with file.turn(0.0 if overdue is not None else TURN_LIMIT_S) as mine:
        newest = file.find(plan)
        if newest is not None and newest.at >= began:  # found by another as we waited: as good as our own
            return _or_refuse(newest.choice(plan.key), plan, needed=forced)
        if not mine and overdue is not None:
            return overdue.choice(plan.key)  # another process asks again: until then what was so holds
        if not mine:
            text = f"another process has been trying it for {TURN_LIMIT_S:g} s"
            return _or_refuse(AcceleratorChoice(Accelerator.TCG, text, fresh=True), plan, needed=forced)
        choice, finding = await _find_out(plan, file, facts, trial.config, trial.scratch_parent, forced=forced)
        file.keep(plan, choice, finding)
    return _or_refuse(choice, plan, needed=forced)


def _plan(config: Config, facts: HostFacts, rung: Accelerator) -> ProofPlan:
    """Raises NoGuestImage, and OSError for QEMU's, without which nothing starts."""
    try:
        return proof_for(config, facts, rung)
    except OSError as exc:
        if rung is not Accelerator.UML:
            raise
        raise NoGuestImage(
            f"{RUNGS[rung]} has no guest image here: {exc.filename or exc}: {exc.strerror}",
            hint="install the package user-mode-linux, then: kata-runtime image build",
        ) from exc


def wanted_accelerator(config: Config, flag: str = "") -> str:
    """auto, kvm, uml or tcg: the flag, else KATAPOD_ACCELERATOR in the environment, else the configuration.

    Raises UsageError.
    """
    chosen = flag or os.environ.get(VARIABLE, "")
    if chosen not in ("", *WANTED):
        raise UsageError(f"cannot use {VARIABLE}={chosen}: it must be {', '.join(WANTED[:-1])} or {WANTED[-1]}")
    return chosen or config.katapod.accelerator


def kept_choice(
    config: Config, facts: HostFacts, proof_file: Path, rung: Accelerator = Accelerator.KVM
) -> AcceleratorChoice | None:
    """What a proof of the rung would find without a boot, or None. Raises OSError and NoGuestImage if a file is
    missing."""
    plan = _plan(config, facts, rung)
    kept = ProofFile(proof_file, facts.boot_id).find(plan)
    return None if kept is None else kept.choice(plan.key)


def likely_choice(
    config: Config, facts: HostFacts, proof_file: Path, needs: Needs = NO_NEEDS
) -> AcceleratorChoice | None:
    """What `auto` would be, as far as that is known without a boot; None: a boot has to tell. It may be overdue.

    Raises OSError if a file of QEMU's guest is missing.
    """
    passed: list[str] = []
    for rung in LADDER:
        if rung is Accelerator.TCG:
            break
        if lacking(capabilities_of(config, facts, rung), needs):
            continue
        try:
            kept = kept_choice(config, facts, proof_file, rung)
        except NoGuestImage as exc:
            passed.append(f"{exc} ({exc.hint})")
            continue
        if kept is None and (rung is not Accelerator.KVM or facts.kvm):
            return None
        if kept is not None and kept.accelerator is rung:
            return replace(kept, reason="; ".join([kept.reason, *passed]))
        passed.append(kept.reason if kept is not None else NO_KVM)
    return AcceleratorChoice(Accelerator.TCG, "; ".join(passed), fresh=False)


def _standing(file: ProofFile, plan: ProofPlan, *, forced: bool) -> AcceleratorChoice | None:
    """The kept answer, as far as it holds. Where it is forced, a kept failure is no answer: whoever forces it may have
    mended it."""
    kept = file.find(plan)
    if kept is None or kept.is_due() or (forced and kept.accelerator is not plan.vm.accelerator):
        return None
    return kept.choice(plan.key)


def _or_refuse(choice: AcceleratorChoice, plan: ProofPlan, *, needed: bool) -> AcceleratorChoice:
    """Raises DeviceMissing where the plan's accelerator is needed and the choice is another."""
    if not needed or choice.accelerator is plan.vm.accelerator:
        return choice
    emulate = "to emulate: --accel tcg"
    console = f"\nlast lines of the guest's console:\n{choice.console}" if choice.console else ""
    raise DeviceMissing(
        f"cannot use {RUNGS[plan.vm.accelerator]}: {choice.reason}\n{guest_of(plan.vm)}{console}",
        hint=f"{choice.advice}; {emulate}" if choice.advice else emulate,
    )


async def _find_out(
    plan: ProofPlan, file: ProofFile, facts: HostFacts, config: Config, scratch_parent: Path, *, forced: bool
) -> tuple[AcceleratorChoice, Finding | None]:
    """The choice, and if the plan's accelerator is not used for it, what the boots say of that."""
    rung = plan.vm.accelerator
    if rung is Accelerator.KVM and not facts.kvm:
        return AcceleratorChoice(Accelerator.TCG, NO_KVM, fresh=True, key=plan.key), None
    if rung is Accelerator.KVM and not forced:
        speed = await asyncio.to_thread(instructions_a_second)
        if speed is not None and speed < INTERPRETED_BELOW:
            reason = f"/dev/kvm opens, but interprets the guest: {speed / 1e6:.1f} million instructions a second"
            return AcceleratorChoice(Accelerator.TCG, reason, fresh=True, key=plan.key), Finding.FAILS
    first_s = float(config.agent.dial_timeout) if forced else FIRST_LIMIT_S

    async def boot(vm: VmSpec, limit_s: float) -> None:
        await prove_machine(vm, limit_s=limit_s, scratch_parent=scratch_parent, vmm=plan.vmm)

    all_s = first_s if forced else ALL_LIMIT_S
    try:
        remedy, trials = await try_boots(plan, boot, cpu_vendor=cpu_vendor(), first_s=first_s, all_s=all_s)
    except HostLacks as exc:
        if forced or rung is not Accelerator.UML:  # without QEMU nothing starts
            raise
        reason = f"{RUNGS[rung]} cannot start here: {exc}"
        return AcceleratorChoice(Accelerator.TCG, reason, fresh=True, advice=exc.hint, key=plan.key), Finding.FAILS
    if remedy is None:
        return _failed(plan, trials, retry_s(file.hangs_before(plan) + 1))
    reason, judge = f"the guest image boots under {RUNGS[rung]}", plan.vmm.judge
    if remedy:
        reason += f" with {remedy} (without: {judge.explain_trials(trials[:1])})"
    advice = judge.advise_setting(remedy, plan.vm.cpu_features)
    found = AcceleratorChoice(rung, reason, fresh=True, remedy=remedy, advice=advice, said=judge.words_of(trials))
    return replace(found, key=plan.key), None


def _failed(plan: ProofPlan, trials: list[Trial], hang_s: float) -> tuple[AcceleratorChoice, Finding]:
    judge, name = plan.vmm.judge, RUNGS[plan.vm.accelerator]
    findings = {judge.finding(trial.failure) for trial in trials}
    worst = next(kind for kind in (Finding.PASSING, Finding.HANGS, Finding.FAILS) if kind in findings)
    opening = f"{name} could not be tried" if worst is Finding.PASSING else _opening(plan.vm.accelerator)
    reason = f"{opening}: {judge.explain_trials(trials)}"
    log.info("%s is not used: %s", name, reason)
    advice = judge.advise(trials, retry_s=hang_s if worst is Finding.HANGS else 0.0)
    choice = AcceleratorChoice(
        Accelerator.TCG, reason, fresh=True, advice=advice, said=judge.words_of(trials), key=plan.key
    )
    return replace(choice, console=trials[-1].failure.console), worst


def _opening(rung: Accelerator) -> str:
    if rung is Accelerator.KVM:
        return "/dev/kvm opens, but the guest image does not boot under it"
    return f"the guest image does not boot under {RUNGS[rung]}"


async def try_boots(
    plan: ProofPlan, boot: Boot, *, cpu_vendor: str, first_s: float, all_s: float
) -> tuple[CpuRemedy | None, list[Trial]]:
    """Boot the plan, then with one remedy after the other, until one works or the time is over.

    Returns the remedy that worked (empty: the plan as it is), or None, and the boots that failed.
    """
    trials: list[Trial] = []
    left_s, limit_s = all_s, first_s
    remedy: CpuRemedy | None = NO_REMEDY
    while remedy is not None:
        began = time.monotonic()
        try:
            await boot(plan.with_remedy(remedy), limit_s)
        except BootNotProven as exc:
            trials.append(Trial(remedy, exc.failure))
        except OSError as exc:
            if exc.errno not in _SHORT_OF:
                raise
            trials.append(Trial(remedy, BootFailure(said=str(exc.strerror), status=1)))
        else:
            return remedy, trials
        if plan.vmm.judge.finding(trials[-1].failure) is Finding.PASSING:
            break
        remedy = plan.vmm.judge.next_remedy(trials, cpu_vendor=cpu_vendor, planned_features=plan.vm.cpu_features)
        left_s -= max(time.monotonic() - began, trials[-1].failure.timed_out_s)
        limit_s = min(FIRST_LIMIT_S, left_s)
        if limit_s < 1.0:
            break
    return None, trials


async def accelerator_for(
    config: Config, facts: HostFacts, layout: Layout, sandbox_id: str, wanted: str = "", needs: Needs = NO_NEEDS
) -> AcceleratorChoice:
    """As choose_accelerator, for a sandbox whose state directory exists; `wanted`: empty for the configuration's."""
    return await choose_accelerator(
        wanted_accelerator(config, wanted),
        config,
        facts,
        layout.proof_file,
        layout.sandbox(sandbox_id).state,
        needs=needs,
    )


def with_guest(config: Config, kernel: Path, initrd: Path) -> Config:
    """The configuration with another guest image."""
    qemu = msgspec.structs.replace(config.qemu, kernel=str(kernel), initrd=str(initrd))
    return msgspec.structs.replace(config, qemu=qemu)
