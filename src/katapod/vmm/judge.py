"""What a guest's boot that failed says, and who can read it: each VMM has a Judge of its own."""

from collections.abc import Sequence
from enum import Enum
from typing import Protocol

from msgspec import Struct

from katapod.vmm.spec import CpuRemedy

__all__ = ["BootFailure", "Finding", "Judge", "Trial"]


class Finding(Enum):
    """What a boot that failed says of the accelerator."""

    FAILS = "fails"  # the accelerator does not run this plan: kept
    HANGS = "hangs"  # it timed out, which load can cause too: kept for a while
    PASSING = "passing"  # nothing: another failure, or a temporary shortage


class BootFailure(Struct, frozen=True):
    """A guest that was booted for the proof and did not say that it works."""

    said: str = ""  # by the VMM, its last lines, first to last
    console: str = ""  # the guest's last lines
    timed_out_s: float = 0.0  # the limit that it reached; 0: it ended before
    status: int | None = None  # of the VMM, negative for a signal; None: it did not end by itself


class Trial(Struct, frozen=True):
    """One boot of the proof that failed."""

    remedy: CpuRemedy
    failure: BootFailure


class Judge(Protocol):
    """Reads what a VMM says of boots that failed."""

    def finding(self, failure: BootFailure) -> Finding:
        """What it says of the accelerator. Whatever is not known to speak of that does not count."""

    def next_remedy(self, trials: Sequence[Trial], *, cpu_vendor: str, planned_features: str) -> CpuRemedy | None:
        """What to change of the CPU after these failures; None: nothing is left to try."""

    def summarize(self, failure: BootFailure) -> str:
        """One line: the VMM's own words where it had any."""

    def explain_trials(self, trials: Sequence[Trial]) -> str:
        """Why boots failed, in one line, each with what was changed for it."""

    def words_of(self, trials: Sequence[Trial]) -> str:
        """The VMM's own words of all trials, each line once."""

    def advise(self, trials: Sequence[Trial], *, retry_s: float = 0.0) -> str:
        """What people can do where no boot worked. `retry_s`: after a time-out, until it is tried again."""

    def advise_setting(self, remedy: CpuRemedy, planned_features: str) -> str:
        """What makes the remedy the plan, so that no boot without it is tried first; empty where no key does."""
