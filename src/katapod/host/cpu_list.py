"""The CPUs of this host that a process, and all that it starts from now on, runs on."""

import os

from katapod.model.errors import UsageError

__all__ = ["use_cpus"]


def use_cpus(cpus: frozenset[int]) -> None:
    """Bind this thread. What the host has is what we may use, which a cgroup may have narrowed. Raises UsageError."""
    here = os.sched_getaffinity(0)
    if lacking := sorted(cpus - here):
        shown = ",".join(map(str, sorted(here)))
        raise UsageError(
            f"cannot use --cpuset-cpus: this process has no CPU {lacking[0]}",
            hint=f"it has {shown}",
        )
    os.sched_setaffinity(0, cpus)
