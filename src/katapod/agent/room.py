"""The room that containers leave to the guest's kernel and to the agent: limits of the cgroup above all of theirs.

A container without limits could otherwise take every process id and every page of the guest: then no crun starts, so
that nobody can look into the container or end what runs in it, and the agent waits for memory. The agent, what it
starts, and the debug console are outside of the group; crun is until it has put the process into its container.
"""

from __future__ import annotations

import os

from katapod.agent import log
from katapod.agent.paths import CGROUP_ROOT
from katapod.rpc.status import RpcError, StatusCode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from katapod.agent.container import Container

__all__ = ["GROUP", "Room", "enable_controllers", "memory_for_containers", "processes_for_containers"]

GROUP = "/containers"
CONTROLLERS = ("cpuset", "cpu", "io", "memory", "hugetlb", "pids")
PROCESS_COST = 8 * (16 << 10)  # bytes; as set_max_threads() of kernel/fork.c has it, and what a small process takes
PAGE_STRUCT_SHARE = 64  # struct page: memory that is plugged costs the kernel a 64th of it
PROCESSES_KEPT = 128  # for crun, shells of the debug console, and kernel threads that come with devices
PROCESSES_KEPT_PER_CPU = 16  # its kernel threads, and the two launches that it may have under way
EXECS_BEYOND = 64  # processes of execs that may join a full group, which the kernel allows: of those kept
PROCESSES_MIN = 64
MEMORY_KEPT = 16 << 20  # for crun, its files, buffers of the network
MEMORY_KEPT_SHARE = 64  # and this part of all: what the kernel charges to nobody grows with it


def memory_for_containers(total: int, total_before: int, used_before: int) -> int:
    """Bytes that all containers may take together. `total` now; `total_before` and `used_before` without any container,
    which others had then, less what the kernel can take back. Pure."""
    used = used_before + (total - total_before) // PAGE_STRUCT_SHARE
    return max(0, total - used - MEMORY_KEPT - total // MEMORY_KEPT_SHARE)


def processes_for_containers(possible: int, outside: int, cpus: int, memory: int) -> int:
    """Processes and threads that all containers may have together. `possible` in the guest, of which `outside` are not
    the containers'; `memory`: what containers may take, as many processes have to fit into it. Pure."""
    kept = outside + PROCESSES_KEPT + PROCESSES_KEPT_PER_CPU * cpus
    return max(PROCESSES_MIN, min(possible - kept, memory // PROCESS_COST))


def enable_controllers(directory: str) -> None:
    """For the groups below `directory`. Raises OSError."""
    with open(f"{directory}/cgroup.controllers") as handle:
        have = handle.read().split()
    for name in CONTROLLERS:
        if name in have:
            with open(f"{directory}/cgroup.subtree_control", "w") as handle:
                handle.write(f"+{name}")


def _number(path: str) -> int:
    """Raises OSError, ValueError."""
    with open(path) as handle:
        return int(handle.read())


def _memory() -> tuple[int, int]:
    """All memory, and what is available of it, bytes. Source: proc(5)."""
    found = {}
    with open("/proc/meminfo") as handle:
        for line in handle:
            key, _, rest = line.partition(":")
            if key in ("MemTotal", "MemAvailable"):
                found[key] = int(rest.split()[0]) << 10
    return found["MemTotal"], found["MemAvailable"]


def _threads() -> int:
    """Threads of all processes, the kernel's included: behind the slash of /proc/loadavg."""
    with open("/proc/loadavg") as handle:
        return int(handle.read().split()[3].partition("/")[2])


class Room:
    """Created before the first container. `processes_max`: of the host, for all of the guest's; 0: no such limit."""

    def __init__(self, processes_max: int) -> None:
        self._processes_max = processes_max
        self._directory = f"{CGROUP_ROOT}{GROUP}"
        self._total_before = self._used_before = self._outside = 0  # without containers
        self._set: tuple[int, int] = (0, 0)

    def follow(self, cpus: int) -> None:
        """Make the group, or adapt its limits to the memory and the CPUs of now. Where it cannot be limited containers
        run without."""
        try:
            total, available = _memory()
            if not self._total_before:
                enable_controllers(CGROUP_ROOT)
                os.makedirs(self._directory, exist_ok=True)
                enable_controllers(self._directory)
                self._outside = _threads()
                self._total_before, self._used_before = total, total - available
            memory = memory_for_containers(total, self._total_before, self._used_before)
            processes = processes_for_containers(self._possible(), self._outside, cpus, memory)
            if (memory, processes) == self._set:
                return
            for name, value in (("memory.max", memory), ("pids.max", processes)):
                with open(f"{self._directory}/{name}", "w") as handle:
                    handle.write(str(value))
            self._set = memory, processes
            log.info(f"containers may have {memory >> 20} MiB and {processes} processes")
        except (OSError, ValueError, KeyError) as exc:
            log.warning(f"cannot keep containers from taking all of the guest: {exc}")

    def _possible(self) -> int:
        limits = [_number("/proc/sys/kernel/threads-max"), _number("/proc/sys/kernel/pid_max")]
        return min(limits + ([self._processes_max] if self._processes_max else []))

    def admit(self, container: Container) -> None:
        """To be called before a process is put into it. Raises RpcError (RESOURCE_EXHAUSTED) if one more would take
        what is kept for the agent."""
        try:
            count = _number(f"{self._directory}/pids.current")
        except (OSError, ValueError):
            return
        if self._set[1] and count >= self._set[1] + EXECS_BEYOND:
            raise _too_many(container, _FULL.format(count=count, limit=self._set[1]))

    def explain(self, container: Container) -> RpcError | None:
        """Why no process could be started in it, if its own group or that of all has as many as it may have."""
        for directory, words in ((container.cgroup_directory, _FULL_ITSELF), (self._directory, _FULL)):
            try:
                count, limit = (_number(f"{directory}/pids.{name}") for name in ("current", "max"))
            except (OSError, ValueError):  # "max": no limit
                continue
            if count >= limit - limit // 8:  # some have ended meanwhile
                return _too_many(container, words.format(count=count, limit=limit))
        return None


_FULL = "the sandbox's containers have {count} processes and threads, and its guest has room for {limit}"
_FULL_ITSELF = "it has {count} processes and threads, and its limit is {limit}"


def _too_many(container: Container, why: str) -> RpcError:
    return RpcError(
        StatusCode.RESOURCE_EXHAUSTED,
        f"cannot run a process in container {container.id}: {why}; end some of them first",
    )
