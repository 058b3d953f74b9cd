"""Which CPU of the host a machine runs on whose one vCPU is several processes: pure.

Each system call of a guest of User-mode Linux is two context switches between its kernel and the process that it
traces. On one CPU they are a third as dear as across two, and the host's scheduler pulls them apart as soon as another
CPU is idle. So the kernel and all that it starts are kept on one CPU, which is chosen, and chosen anew, by load.
"""

from collections.abc import Collection, Mapping

from msgspec import Struct
from msgspec.structs import replace

__all__ = ["CpuTimes", "Patience", "busy_shares", "choose_cpu", "consider", "parse_cpu_times"]

MACHINE_WEIGHT = 0.25  # of a CPU: what a machine that is there already may come to want
WANTED_SHARE = 0.2  # of a period that a machine has stood in line for its CPU, for a move to be of use
GAIN_SHARE = 0.4  # by which another CPU has to be less busy
ROUNDS_BEFORE_A_MOVE = 2
ROUNDS_OF_REST = 6


class CpuTimes(Struct, frozen=True):
    """Of one CPU since the host's start, in ticks."""

    busy: int
    total: int


def parse_cpu_times(text: str) -> dict[int, CpuTimes]:
    """/proc/stat by number of CPU; a line that is not understood is left out. Source: proc_stat(5)."""
    found = {}
    for line in text.splitlines():
        name, *words = line.split() or [""]
        number = name.removeprefix("cpu")
        if name == number or not number.isdecimal() or len(words) < 8 or not all(map(str.isdecimal, words)):
            continue
        ticks = [int(word) for word in words[:8]]  # guest time behind them is part of user time
        idle = ticks[3] + ticks[4]
        found[int(number)] = CpuTimes(sum(ticks) - idle, sum(ticks))
    return found


def busy_shares(before: Mapping[int, CpuTimes], after: Mapping[int, CpuTimes]) -> dict[int, float]:
    """How busy each CPU was between two looks, 0 to 1. One without a tick in between counts as idle."""
    shares = {}
    for number, now in after.items():
        then = before.get(number, now)
        passed = now.total - then.total
        shares[number] = min(1.0, max(0.0, (now.busy - then.busy) / passed)) if passed > 0 else 0.0
    return shares


def choose_cpu(allowed: Collection[int], machines: Mapping[int, int], busy: Mapping[int, float]) -> int:
    """The least loaded of the CPUs that are allowed, of which there is one at least. `machines` of ours are on each."""
    return min(allowed, key=lambda cpu: (busy.get(cpu, 0.0) + MACHINE_WEIGHT * machines.get(cpu, 0), cpu))


class Patience(Struct, frozen=True):
    """What a machine remembers from one look to the next."""

    rounds: int = 0  # one after the other that spoke for a move
    rest: int = 0  # for which it stays where it is


def consider(
    patience: Patience, here: int, there: int, busy: Mapping[int, float], *, waited_share: float
) -> tuple[bool, Patience]:
    """Whether a machine goes from the CPU `here` to the least loaded one, `there`. It has stood in line for
    `waited_share` of the period; one that does not want for its CPU stays."""
    if patience.rest > 0:
        return False, replace(patience, rest=patience.rest - 1)
    gain = busy.get(here, 0.0) - busy.get(there, 0.0)
    if there == here or waited_share < WANTED_SHARE or gain < GAIN_SHARE:
        return False, Patience()
    if patience.rounds + 1 < ROUNDS_BEFORE_A_MOVE:
        return False, Patience(patience.rounds + 1)
    return True, Patience(rest=ROUNDS_OF_REST)
