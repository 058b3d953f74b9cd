"""Work in the background: this process and what it has started leave the CPU to others who want it."""

import contextlib
import os
from pathlib import Path

from katapod.host.descendants import descendants

__all__ = ["leave_background", "stay_in_background"]

CAP_SYS_NICE = 23  # linux/capability.h
BACKGROUND, USUAL = 10, 0
"""Nice values. With 10 a thread gets a tenth of what one with 0 gets; with 19, or as SCHED_IDLE, a busy host would
hold up a boot until its time limit. Source: sched(7)."""


def stay_in_background() -> None:
    """Put this process and its descendants behind others. Does nothing where there would be no way back."""
    if _may_come_back():
        _set_all(BACKGROUND)


def leave_background() -> None:
    """The way back, for all of their threads."""
    if _may_come_back():
        _set_all(USUAL)


def _set_all(nice: int) -> None:
    for pid in descendants(os.getpid()):
        with contextlib.suppress(OSError):  # it has ended; or the kernel has no autogroups, one for each session
            Path(f"/proc/{pid}/autogroup").write_text(str(nice))
        with contextlib.suppress(FileNotFoundError):
            for thread in os.listdir(f"/proc/{pid}/task"):
                with contextlib.suppress(ProcessLookupError):
                    os.setpriority(os.PRIO_PROCESS, int(thread), nice)


def _may_come_back() -> bool:
    """To raise a priority takes a capability that root in a container may lack."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> CAP_SYS_NICE & 1)
    return False
