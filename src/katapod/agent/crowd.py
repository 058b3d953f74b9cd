"""Execs into a container with so many processes that one more would hardly get the CPU.

Part of crun's work is done within the container, as one of its processes: beside 1,500 that run, that takes a minute.
So crun has a higher priority there, and the process that is executed has the usual one once it runs.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from katapod.agent.container import Container

__all__ = ["calm", "nice_for"]

CROWD = 64  # processes
NICE = -20  # which nothing else has here: SCHED_RESET_ON_FORK takes the agent's own from what it starts


def nice_for(container: Container) -> int:
    """The priority of crun for an exec; 0, the usual one, unless the container is crowded. Source: sched(7)."""
    try:
        with open(f"{container.cgroup_directory}/pids.current") as handle:
            return NICE if int(handle.read()) >= CROWD else 0
    except (OSError, ValueError):
        return 0


def calm(container: Container) -> None:
    """Give the usual priority to all processes and threads in the container that have got crun's."""
    for number in _threads(container):
        try:
            if os.getpriority(os.PRIO_PROCESS, number) == NICE:
                os.setpriority(os.PRIO_PROCESS, number, 0)
        except OSError:
            continue  # it has ended


def _threads(container: Container) -> Iterator[int]:
    """Their ids: priorities are those of threads."""
    try:
        with open(f"{container.cgroup_directory}/cgroup.threads") as handle:
            yield from [int(line) for line in handle]
    except OSError:
        return
