"""What QEMU's and KVM's words mean: whether a boot that failed speaks of KVM, and what may help."""

import re
from collections.abc import Sequence

from katapod.vmm.judge import BootFailure, Finding, Trial
from katapod.vmm.spec import CpuRemedy

__all__ = [
    "QemuJudge",
    "advise",
    "advise_setting",
    "explain_trials",
    "judge_failure",
    "next_remedy",
    "summarize",
    "words_of",
]

SAID_MAX = 2000  # characters kept of what QEMU said
LINE_MAX = 300

_SHORTAGES = re.compile(
    r"cannot allocate memory|out of memory|too many open files|no space left on device|disk quota exceeded"
    r"|resource temporarily unavailable|device or resource busy|interrupted system call|cannot set up guest memory",
    re.IGNORECASE,
)
_OF_KVM = re.compile(r"\bkvm|\bMSR\b|\bv?cpu|virtuali[sz]ation", re.IGNORECASE)
_OF_A_NAME = re.compile(r"property '\S+' not found|unable to find CPU model|invalid parameter", re.IGNORECASE)
_ABORTED = (-6, -11)  # SIGABRT; as process 1 of its PID namespace it ends by abort(3)'s last means, a fault
_WISHED_FOR = (-9, -15)  # somebody, or the kernel for lack of memory, ended it
_MSR = re.compile(r"\bMSR (0x[0-9a-f]+)", re.IGNORECASE)


def judge_failure(failure: BootFailure) -> Finding:
    """What a boot that failed says of KVM. Whatever is not known to speak of it does not count."""
    if _SHORTAGES.search(failure.said) or failure.status in _WISHED_FOR:
        return Finding.PASSING
    if failure.timed_out_s:
        return Finding.HANGS
    if failure.status in _ABORTED:
        return Finding.FAILS
    if any(_OF_KVM.search(line) and not _OF_A_NAME.search(line) for line in _errors(failure.said).splitlines()):
        return Finding.FAILS
    # QEMU ran to an end of the guest's making: a panic, a triple fault
    return Finding.PASSING if failure.status else Finding.FAILS


def _errors(said: str) -> str:
    """Without warnings: QEMU warns of every feature of a CPU model that the host does not have."""
    return "\n".join(line for line in said.splitlines() if "warning: " not in line)


def _error_line(said: str) -> str:
    """What went wrong, in one line, without the program's name."""
    for line in _errors(said).splitlines():
        text = re.sub(r"^\S*qemu\S*: ", "", line.strip())
        if text:
            return text[:LINE_MAX]
    return ""


_FEATURE_OF_MSR = {
    0x48: "spec-ctrl",
    0xCF: "core-capability",
    0x10A: "arch-capabilities",
    0x122: "tsx-ctrl",
    0x345: "pmu",
    0x6E0: "tsc-deadline",
    0xC0000104: "tsc-scale",
    0xC001011F: "virt-ssbd",
    **dict.fromkeys(range(0x480, 0x493), "vmx"),
}
"""Which property of QEMU's CPUs keeps it from setting a register. Source: QEMU's target/i386/cpu.h and cpu.c."""

_USUAL = "arch-capabilities"  # the feature that nested and paravirtual KVM most often lacks


def next_remedy(trials: Sequence[Trial], *, cpu_vendor: str, planned_features: str) -> CpuRemedy | None:
    """What to change of the CPU after these failures; None: nothing is left to try.

    First the features whose registers QEMU says it cannot set, then the usual one, then a model of named features
    in place of the host's CPU. Each step switches off one thing more, so this ends.
    """
    last = trials[-1]
    if last.remedy.model:
        return None
    off = {part for part in f"{planned_features},{last.remedy.features}".split(",") if part}
    named = [_FEATURE_OF_MSR.get(int(number, 16), "") for number in _MSR.findall(last.failure.said)]
    for feature in (*named, _USUAL):
        switch = f"{feature}=off"
        if feature and switch not in off:
            return CpuRemedy(features=",".join(part for part in (last.remedy.features, switch) if part))
    return CpuRemedy(model="EPYC" if cpu_vendor in ("AuthenticAMD", "HygonGenuine") else "Haswell-noTSX")


def explain_trials(trials: Sequence[Trial]) -> str:
    """Why boots failed, in one line, each with what was changed for it."""
    parts: list[str] = []
    for trial in trials:
        summary = summarize(trial.failure)
        parts.append(f"with {trial.remedy}: {summary}" if trial.remedy else summary)
    return "; ".join(parts)


def words_of(trials: Sequence[Trial]) -> str:
    """QEMU's own words of all trials: each line once, warnings left out."""
    lines = [line for trial in trials for line in _errors(trial.failure.said).splitlines()]
    return "\n".join(dict.fromkeys(lines))[-SAID_MAX:]


def advise(trials: Sequence[Trial], *, retry_s: float = 0.0) -> str:
    """What people can do where no boot under KVM worked. `retry_s`: after a time-out, until it is tried again."""
    last = trials[-1].failure
    if judge_failure(last) is Finding.PASSING:
        return "this says nothing of KVM, which the next start tries again"
    parts: list[str] = []
    if any(_MSR.search(trial.failure.said) for trial in trials):
        parts.append("on this host, echo 1 > /sys/module/kvm/parameters/ignore_msrs may help: KVM is tried again then")
    elif re.search(r"permission denied|operation not permitted", last.said, re.IGNORECASE):
        parts.append("give root the use of /dev/kvm, then kata-runtime check --boot")
    if retry_s:
        parts.append(f"KVM is tried again after {retry_s / 60:.0f} min, or at once by kata-runtime check --boot")
    return "; ".join(parts) or 'kata-runtime check --boot tries again; accelerator = "tcg" in [katapod] tries nothing'


def advise_setting(remedy: CpuRemedy, planned_features: str) -> str:
    """What makes the remedy the plan, so that no boot without it is tried first; empty where no key does."""
    if remedy.model or not remedy.features:
        return ""
    features = ",".join(part for part in (planned_features, remedy.features) if part)
    return f'to set it for good: cpu_features = "{features}" in [hypervisor.qemu]'


def summarize(failure: BootFailure) -> str:
    """One line: QEMU's own words where it had any."""
    if line := _error_line(failure.said):
        return f"QEMU said: {line}"
    if failure.timed_out_s:
        return f"the guest did not finish booting within {round(failure.timed_out_s, 1):g} s"
    last = failure.console.rpartition("\n")[2][:LINE_MAX]
    end = "QEMU ended" if failure.status else "the guest ended"
    return f"{end} without the agent's word" + (f", its console's last line: {last}" if last else "")


class QemuJudge:
    """A Judge."""

    advise = staticmethod(advise)
    advise_setting = staticmethod(advise_setting)
    explain_trials = staticmethod(explain_trials)
    finding = staticmethod(judge_failure)
    next_remedy = staticmethod(next_remedy)
    summarize = staticmethod(summarize)
    words_of = staticmethod(words_of)
