"""What it means when a guest does not boot under User-mode Linux."""

import re
from collections.abc import Sequence

from katapod.vmm.judge import BootFailure, Finding, Trial
from katapod.vmm.spec import CpuRemedy

__all__ = ["UmlJudge"]

LINE_MAX = 300
SAID_MAX = 2000

_SHORTAGES = re.compile(
    r"cannot allocate memory|out of memory|too many open files|no space left on device|disk quota exceeded"
    r"|resource temporarily unavailable|device or resource busy|interrupted system call",
    re.IGNORECASE,
)
_WISHED_FOR = (-9, -15)  # somebody, or the kernel for lack of memory, ended it


class UmlJudge:
    """A Judge."""

    def finding(self, failure: BootFailure) -> Finding:
        if _SHORTAGES.search(failure.said) or failure.status in _WISHED_FOR:
            return Finding.PASSING
        if failure.timed_out_s:
            return Finding.HANGS
        return Finding.FAILS if failure.status is not None else Finding.PASSING

    def next_remedy(self, trials: Sequence[Trial], *, cpu_vendor: str, planned_features: str) -> CpuRemedy | None:
        """Its CPU is the host's, as it is."""
        return None

    def summarize(self, failure: BootFailure) -> str:
        last = failure.console.rpartition("\n")[2][:LINE_MAX]
        if failure.timed_out_s:
            return f"the guest did not finish booting within {round(failure.timed_out_s, 1):g} s"
        if said := failure.said.rpartition("\n")[2][:LINE_MAX]:
            return f"the kernel said: {said}"
        return "the guest ended without the agent's word" + (f", its console's last line: {last}" if last else "")

    def explain_trials(self, trials: Sequence[Trial]) -> str:
        return "; ".join(self.summarize(trial.failure) for trial in trials)

    def words_of(self, trials: Sequence[Trial]) -> str:
        lines = [line for trial in trials for line in trial.failure.said.splitlines()]
        return "\n".join(dict.fromkeys(lines))[-SAID_MAX:]

    def advise(self, trials: Sequence[Trial], *, retry_s: float = 0.0) -> str:
        if retry_s:
            return f"it is tried again after {retry_s / 60:.0f} min, or at once by kata-runtime check --boot"
        return "kata-runtime check --boot tries again"

    def advise_setting(self, remedy: CpuRemedy, planned_features: str) -> str:
        return ""
