"""Keeps a machine on one CPU of the host, and moves it when load asks for it. See plan/cpu_placement.py for why and
when.

How it is used, for a machine whose processes are all children of one:

    with CpuPlacement(lock_file) as placement:   # early: the load is what has passed since then
        with placement.starting():
            child = start_in_jail(...)           # and what it starts inherits the CPU
        async with beside(placement.follow(child.pid), name="cpu-placement"):
            ...

A claim to a CPU is a lock on one byte of a file that all supervisors share (fcntl(2), open file description locks), so
that ten machines that start at once do not all take the same one. It is gone when its holder is, however that ends.

Nothing is forced: CPUs are taken from what the supervisor itself was allowed, and of these from what the machine's
cpuset allows. Where that is one CPU, or where somebody else has set the machine's CPUs meanwhile, nothing is done.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from types import TracebackType

from katapod.host.descendants import descendants
from katapod.host.locks import FLOCK, free_byte, try_byte
from katapod.host.thread_times import thread_times
from katapod.model.tokens import random_below
from katapod.plan.cpu_placement import CpuTimes, Patience, busy_shares, choose_cpu, consider, parse_cpu_times

__all__ = ["CpuPlacement"]

log = logging.getLogger(__name__)

PERIOD_S = 5.0
MACHINES_MAX = 4096  # that can be counted on one CPU
STAT = Path("/proc/stat")


class CpuPlacement:
    """Of one machine. `cpu` is where it is; None: it is not held to one."""

    def __init__(self, lock_file: Path) -> None:
        """Raises OSError."""
        lock_file.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
        self._fd = os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._allowed = frozenset(os.sched_getaffinity(0))
        self._times = _cpu_times()
        self._slot: int | None = None
        self.cpu: int | None = None

    def __enter__(self) -> "CpuPlacement":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)  # and with it the claim

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Choose a CPU; what this thread starts meanwhile runs there."""
        if len(self._allowed) < 2:
            yield
            return
        now = _cpu_times()
        busy, self._times = busy_shares(self._times, now), now
        self._take(choose_cpu(self._allowed, self._machines(self._allowed), busy))
        assert self.cpu is not None
        os.sched_setaffinity(0, {self.cpu})
        try:
            yield
        finally:
            os.sched_setaffinity(0, self._allowed)

    async def follow(self, pid: int, *, period_s: float = PERIOD_S) -> None:
        """Look at the load again and again, and move the machine, which is the process `pid` and all that it has
        started. Ends when the machine is gone or has been given CPUs by somebody else."""
        patience, waited = Patience(), _waited_ns(pid)
        while self.cpu is not None:
            await asyncio.sleep(period_s * (0.75 + random_below(512) / 1024))  # not all at the same moment
            try:
                before, waited = waited, _waited_ns(pid)
                share = max(0, waited - before) / (period_s * 1e9)
                if not self._is_ours(pid):
                    return
                patience = self._look(pid, patience, share)
            except (ProcessLookupError, FileNotFoundError):
                return
            except OSError as exc:  # a cpuset that has changed in this moment; it is looked at anew
                log.debug("cannot move process %d to another CPU: %s", pid, exc.strerror)

    def _look(self, pid: int, patience: Patience, waited_share: float) -> Patience:
        assert self.cpu is not None
        now = _cpu_times()
        busy, self._times = busy_shares(self._times, now), now
        there = choose_cpu(self._allowed, self._machines(self._allowed), busy)
        moves, patience = consider(patience, self.cpu, there, busy, waited_share=waited_share)
        if moves:
            # the kernel keeps only those that its cpuset allows
            os.sched_setaffinity(pid, self._allowed)
            allowed = os.sched_getaffinity(pid)
            self._move(pid, choose_cpu(allowed, self._machines(allowed), busy))
        return patience

    def _is_ours(self, pid: int) -> bool:
        """Whether it is still for us to move the machine. If it may not use its CPU any more, since its cpuset has
        changed, it goes to one that it may use; if it may use others as well, somebody wants that."""
        allowed = os.sched_getaffinity(pid)
        if self.cpu not in allowed:
            self._allowed = frozenset(allowed)
            self._move(pid, choose_cpu(allowed, self._machines(allowed), {}))
        return os.sched_getaffinity(pid) == {self.cpu}

    def _move(self, pid: int, cpu: int) -> None:
        _pin(pid, {cpu})
        self._take(cpu)

    # -- claims. The machines of a CPU have the bytes from CPU * MACHINES_MAX

    def _machines(self, cpus: Collection[int]) -> dict[int, int]:
        """How many of others are on each."""
        return {cpu: len(list(self._taken(cpu))) for cpu in cpus}

    def _taken(self, cpu: int) -> Iterator[int]:
        at, end = cpu * MACHINES_MAX, (cpu + 1) * MACHINES_MAX
        while at < end:
            asked = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, at, end - at, 0)
            kind, _, start, length, _ = FLOCK.unpack(fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, asked))
            if kind == fcntl.F_UNLCK:
                return
            at = min(start + length, end)
            yield from range(start, at)

    def _take(self, cpu: int) -> None:
        """Claim it, in place of what we had."""
        log.debug("on CPU %d", cpu)
        if self._slot is not None:
            free_byte(self._fd, self._slot)
        self.cpu, self._slot = cpu, None
        taken = set(self._taken(cpu))
        for slot in range(cpu * MACHINES_MAX, (cpu + 1) * MACHINES_MAX):
            if slot not in taken and try_byte(self._fd, slot):  # or another was faster
                self._slot = slot
                return


def _cpu_times() -> dict[int, CpuTimes]:
    return parse_cpu_times(STAT.read_text())


def _waited_ns(pid: int) -> int:
    return sum(thread.waited_ns for each in descendants(pid) for thread in thread_times(each))


def _pin(pid: int, cpus: Collection[int]) -> None:
    """All of its threads, and those of all that it has started; once more while one is found that has been started
    meanwhile by one that was elsewhere. What those start that are there is there, so this ends whatever they start.

    Raises OSError: ProcessLookupError if it is gone.
    """
    os.sched_setaffinity(pid, cpus)
    there = os.sched_getaffinity(pid)  # those of `cpus` that its cpuset allows
    moved = True
    while moved:
        moved = False
        for thread in _threads(pid):
            with contextlib.suppress(ProcessLookupError):
                if os.sched_getaffinity(thread) != there:
                    os.sched_setaffinity(thread, cpus)
                    moved = True


def _threads(pid: int) -> set[int]:
    found: set[int] = set()
    for each in descendants(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.update(map(int, os.listdir(f"/proc/{each}/task")))
    return found
