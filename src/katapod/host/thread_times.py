"""How long the threads of a process have run, and stood in line for a CPU of this host."""

import os
from typing import NamedTuple

__all__ = ["ThreadTimes", "thread_times"]


class ThreadTimes(NamedTuple):
    """Since the thread began, nanoseconds."""

    thread_id: int
    name: str
    run_ns: int
    waited_ns: int


def thread_times(pid: int) -> list[ThreadTimes]:
    """Of each thread; of a process that ends meanwhile those that could be read.

    Source: comm and schedstat of proc(5), Documentation/scheduler/sched-stats.rst.
    """
    found = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/schedstat") as handle:
                run, waited, _ = map(int, handle.read().split())
            with open(f"/proc/{pid}/task/{thread}/comm") as handle:
                found.append(ThreadTimes(int(thread), handle.read().rstrip("\n"), run, waited))
    except (OSError, ValueError):
        pass
    return found
