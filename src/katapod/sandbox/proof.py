"""Accelerator by proof: KVM is used only where the machine that sandboxes start with has been seen to boot under it.

/dev/kvm that opens proves nothing: there are hosts where the VMM ends, or where guest kernels hang. The plan of a proof
and what a failure means are vmm/proof.py's, what is kept is proof_file.py's. Here guests are booted.
"""

import asyncio
import contextlib
import errno
import logging
import os
import secrets
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from katapod.host.facts import HostFacts, cpu_vendor
from katapod.host.logs import read_tail
from katapod.host.tasks import beside
from katapod.model.config import Config
from katapod.model.errors import DeviceMissing, KatapodError, UsageError
from katapod.model.layout import Layout
from katapod.sandbox.agent_link import claim_channel
from katapod.sandbox.failures import guest_of
from katapod.sandbox.patience import patient_timeout
from katapod.sandbox.planning import proof_for
from katapod.sandbox.proof_file import ProofFile, now, retry_s
from katapod.sandbox.vmms import DEFAULT_VMM
from katapod.vmm.errors import VmmFailed, VmmLinkBroken, VmmRefused
from katapod.vmm.judge import BootFailure, Finding, Trial
from katapod.vmm.proof import NO_KVM, PROOF_MEM_MIB, ProofPlan, Verdict
from katapod.vmm.protocol import Handed, VirtualMachine, Vmm, VmmLogs
from katapod.vmm.spec import NO_REMEDY, Accelerator, CpuRemedy, VmSpec

__all__ = [
    "BootNotProven",
    "accelerator_for",
    "choose_accelerator",
    "kept_verdict",
    "prove_boot",
    "prove_machine",
    "wanted_accelerator",
    "with_guest",
]

log = logging.getLogger(__name__)

VARIABLE = "KATAPOD_ACCELERATOR"
KVM_LIMIT_S = 10.0  # of one boot
KVM_ALL_S = 15.0  # of one boot and those with remedies
TCG_LIMIT_S = 90.0
TURN_LIMIT_S = 90.0  # for another who finds out: the longest dial_timeout that is in use, and more
SILENCE_S = 10.0  # that is told of a VMM that did not come up
CONSOLE_S = 0.05  # for the console's last bytes
_SHORT_OF = {errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EAGAIN}

Boot = Callable[[VmSpec, float], Awaitable[None]]


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
        uuid=str(uuid.uuid4()),
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
    token = secrets.token_hex(8)
    with tempfile.TemporaryDirectory(
        prefix="proof-" if scratch_parent else "katapod-proof-", dir=scratch_parent
    ) as scratch:
        directory = Path(scratch)
        spec = replace(
            vm,
            sandbox_id=f"proof-{token}",
            uuid=str(uuid.uuid4()),
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


@dataclass(frozen=True, slots=True)
class _End:
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
        async with vmm.start(spec, logs, given=given) as vm:
            stopped = vm.expect_stop()
            timed_out = 0.0
            try:
                async with patient_timeout(limit_s, vm.pid):
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


async def choose_accelerator(
    wanted: str,
    config: Config,
    facts: HostFacts,
    proof_file: Path,
    scratch_parent: Path,
    *,
    again: bool = False,
) -> Verdict:
    """Return the accelerator for `wanted` (auto, kvm, tcg), and what of the plan's CPU has to differ for it.

    Starts at the same time find out once. With `again` a verdict that was kept does not count. `scratch_parent` is the
    caller's to remove: nothing of a proof stays even when we are killed. Raises DeviceMissing where kvm is wanted and
    does not work; OSError if a file of the guest is missing.
    """
    if wanted == "tcg":
        return Verdict(Accelerator.TCG, "forced", fresh=False)
    forced = wanted == "kvm"
    if forced and not facts.kvm:
        raise DeviceMissing(
            "cannot use KVM: /dev/kvm does not answer",
            hint="load kvm_intel or kvm_amd, or let Katapod emulate: --accel tcg",
        )
    plan, file, began = proof_for(config, facts), ProofFile(proof_file, facts.boot_id), now()
    kept = None if again else _standing(file, plan, forced=forced)
    if kept is not None:
        return kept
    overdue = file.find(plan) if not forced and not again else None
    async with file.turn(0.0 if overdue is not None else TURN_LIMIT_S) as mine:
        newest = file.find(plan)
        if newest is not None and newest.at >= began:  # found by another as we waited: as good as our own
            return _or_refuse(newest.verdict(plan.key), plan, needed=forced)
        if not mine and overdue is not None:
            return overdue.verdict(plan.key)  # another process asks again: until then what was so holds
        if not mine:
            text = f"another process has been trying it for {TURN_LIMIT_S:g} s"
            return _or_refuse(Verdict(Accelerator.TCG, text, fresh=True), plan, needed=forced)
        verdict, finding = await _find_out(plan, file, facts, config, scratch_parent, forced=forced)
        file.keep(plan, verdict, finding)
    return _or_refuse(verdict, plan, needed=forced)


def wanted_accelerator(config: Config, flag: str = "") -> str:
    """auto, kvm or tcg: the flag, else KATAPOD_ACCELERATOR in the environment, else the configuration.

    Raises UsageError.
    """
    chosen = flag or os.environ.get(VARIABLE, "")
    if chosen not in ("", "auto", "kvm", "tcg"):
        raise UsageError(f"cannot use {VARIABLE}={chosen}: it is none of auto, kvm, tcg")
    return chosen or config.katapod.accelerator


def kept_verdict(config: Config, facts: HostFacts, proof_file: Path) -> Verdict | None:
    """What choose_accelerator would find without a boot, or None. Raises OSError if a file is missing."""
    plan = proof_for(config, facts)
    kept = ProofFile(proof_file, facts.boot_id).find(plan)
    return None if kept is None else kept.verdict(plan.key)


def _standing(file: ProofFile, plan: ProofPlan, *, forced: bool) -> Verdict | None:
    """The kept answer, as far as it holds. Where KVM is forced, a kept failure is no answer: whoever forces it may have
    mended it."""
    kept = file.find(plan)
    if kept is None or kept.is_due() or (forced and kept.accelerator is not Accelerator.KVM):
        return None
    return kept.verdict(plan.key)


def _or_refuse(verdict: Verdict, plan: ProofPlan, *, needed: bool) -> Verdict:
    """Raises DeviceMissing where KVM is needed and the verdict is another."""
    if not needed or verdict.accelerator is Accelerator.KVM:
        return verdict
    emulate = "to emulate: --accel tcg"
    console = f"\nlast lines of the guest's console:\n{verdict.console}" if verdict.console else ""
    raise DeviceMissing(
        f"cannot use KVM: {verdict.reason}\n{guest_of(plan.vm)}{console}",
        hint=f"{verdict.advice}; {emulate}" if verdict.advice else emulate,
    )


async def _find_out(
    plan: ProofPlan, file: ProofFile, facts: HostFacts, config: Config, scratch_parent: Path, *, forced: bool
) -> tuple[Verdict, Finding | None]:
    """The verdict, and if KVM is not used for it, what the boots say of KVM."""
    if not facts.kvm:
        return Verdict(Accelerator.TCG, "this host has no /dev/kvm", fresh=True, key=plan.key), None
    first_s = float(config.agent.dial_timeout) if forced else KVM_LIMIT_S

    async def boot(vm: VmSpec, limit_s: float) -> None:
        await prove_machine(vm, limit_s=limit_s, scratch_parent=scratch_parent, vmm=plan.vmm)

    all_s = first_s if forced else KVM_ALL_S
    remedy, trials = await try_kvm(plan, boot, cpu_vendor=cpu_vendor(), first_s=first_s, all_s=all_s)
    if remedy is None:
        return _failed(plan, trials, retry_s(file.hangs_before(plan) + 1))
    reason, judge = "the guest image boots under KVM", plan.vmm.judge
    if remedy:
        reason += f" with {remedy} (without: {judge.explain_trials(trials[:1])})"
    advice = judge.advise_setting(remedy, plan.vm.cpu_features)
    found = Verdict(Accelerator.KVM, reason, fresh=True, remedy=remedy, advice=advice, said=judge.words_of(trials))
    return replace(found, key=plan.key), None


def _failed(plan: ProofPlan, trials: list[Trial], hang_s: float) -> tuple[Verdict, Finding]:
    judge = plan.vmm.judge
    findings = {judge.finding(trial.failure) for trial in trials}
    worst = next(kind for kind in (Finding.PASSING, Finding.HANGS, Finding.FAILS) if kind in findings)
    opening = "KVM could not be tried" if worst is Finding.PASSING else NO_KVM
    reason = f"{opening}: {judge.explain_trials(trials)}"
    log.info("KVM is not used: %s", reason)
    advice = judge.advise(trials, retry_s=hang_s if worst is Finding.HANGS else 0.0)
    verdict = Verdict(Accelerator.TCG, reason, fresh=True, advice=advice, said=judge.words_of(trials), key=plan.key)
    return replace(verdict, console=trials[-1].failure.console), worst


async def try_kvm(
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
        limit_s = min(KVM_LIMIT_S, left_s)
        if limit_s < 1.0:
            break
    return None, trials


async def accelerator_for(
    config: Config, facts: HostFacts, layout: Layout, sandbox_id: str, wanted: str = ""
) -> Verdict:
    """As choose_accelerator, for a sandbox whose state directory exists; `wanted`: empty for the configuration's."""
    return await choose_accelerator(
        wanted_accelerator(config, wanted),
        config,
        facts,
        layout.proof_file,
        layout.sandbox(sandbox_id).state,
    )


def with_guest(config: Config, kernel: Path, initrd: Path) -> Config:
    """The configuration with another guest image."""
    qemu = msgspec.structs.replace(config.qemu, kernel=str(kernel), initrd=str(initrd))
    return msgspec.structs.replace(config, qemu=qemu)
