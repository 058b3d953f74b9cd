"""What is measured in a round. A suite takes one sample of each of its metrics from each contestant.

Suites yield readings as they come. A contestant that fails loses the sample, and the others go on.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from bench.by_hand import SHARE
from bench.containerd import CTR_KATAPOD, CTR_RUNC, shim_resident_mib, start_of_shim
from bench.contestants import PEERS, Contestant
from bench.measure import BenchError, Outcome, detached, execute, run_containers, run_one
from bench.memory import KATAPOD_PARTS, pss_mib_by_part
from bench.pool import wait_ready
from bench.raw_boot import RawBoot
from bench.rows import Metric
from bench.workload import DD

__all__ = ["RAW", "Reading", "Stage", "Suite", "all_suites"]

RAW = ("raw boot", "bzImage")
HELLO = ("echo", "hello")
IDLE = ("sleep", "1000")
SETTLE_S = 3.0  # until an idle guest has given back what it freed
RUNTIMES = (*PEERS, "Katapod cold", "Katapod template", "Katapod pool")
IMAGE, BUNDLE = "Katapod image", "Katapod bundle"
BY_HAND, SHARED = "QEMU by hand", "Katapod share"

Reading = tuple[Metric, str, float]
"""What was measured, of whom, and the value."""


@dataclass
class Stage:
    """What suites work with: who takes part, and who failed at what."""

    raw: RawBoot
    contestants: dict[str, Contestant]
    failures: list[str] = field(default_factory=list)
    by_hand: Callable[[], Outcome] | None = None  # the script of the share, in a VM without Katapod
    scratch: Path = Path(".")  # for what a suite writes

    def each(self, names: Sequence[str], turn: int) -> Iterator[Contestant]:
        """Those that are there, beginning with another one each round."""
        there = [self.contestants[name] for name in names if name in self.contestants]
        first = turn % len(there) if there else 0
        yield from there[first:] + there[:first]

    @contextlib.contextmanager
    def tolerating(self, who: str) -> Iterator[None]:
        try:
            yield
        except BenchError as error:
            self.failures.append(f"{who}: {error}")


@dataclass(frozen=True)
class Suite:
    """`rounds`: in how many rounds of the run it takes part; None: in all. `extra`: only with --full."""

    group: str
    about: str
    metrics: tuple[Metric, ...]
    contestants: tuple[str, ...]
    measure: Callable[[Stage, Sequence[str], int], Iterator[Reading]]
    rounds: int | None = None
    extra: bool = False


BOOT = Metric(RAW[0], "s", base=RAW)


def _boots(stage: Stage, names: Sequence[str], turn: int) -> Iterator[Reading]:
    for name in names:
        if name in stage.raw.kernels:
            yield BOOT, name, execute(stage.raw.command(name), limit_s=120).end_s


START = Metric(
    "run until output",
    "s",
    base=RAW,
    budgets={"Katapod cold": 1.6, "Katapod template": 0.5, "Katapod pool": 0.2},
    against={"Katapod template": ("runsc", 5.0), "Katapod pool": ("runsc", 5.0)},
)
START_END = Metric("run until its end", "s", base=RAW)


def _starts(stage: Stage, names: Sequence[str], turn: int) -> Iterator[Reading]:
    for contestant in stage.each(names, turn):
        first, whole = [], []
        with stage.tolerating(contestant.name):
            for _ in range(1 if contestant.name == "Katapod cold" else 3):
                wait_ready(contestant)
                outcome = run_one(contestant, HELLO)
                first.append(outcome.first_s)
                whole.append(outcome.end_s)
            wait_ready(contestant)
            yield START, contestant.name, median(first)
            yield START_END, contestant.name, median(whole)


EXEC = Metric("exec until output", "s", base=RAW, budgets=dict.fromkeys((*RUNTIMES[3:], CTR_KATAPOD), 0.1))
CTR = Metric("ctr run until output", "s", base=RAW, budgets={CTR_KATAPOD: 0.6})
CTR_END = Metric("ctr run until its end", "s", base=RAW)
SHIM_START = Metric("shim, start until its address", "s", budgets={CTR_KATAPOD: 0.1})
SHIM_MEMORY = Metric("shim, resident", "MiB", budgets={CTR_KATAPOD: 40.0})
PSS = Metric("idle PSS, all", "MiB", budgets=dict.fromkeys(RUNTIMES[3:], 160.0))
PSS_PARTS = {part: Metric(f"idle PSS, {part}", "MiB") for part in KATAPOD_PARTS}


def _idle(stage: Stage, names: Sequence[str], turn: int) -> Iterator[Reading]:
    """All are up together; each is asked in turn."""
    with contextlib.ExitStack() as stack:
        up: list[tuple[Contestant, str]] = []
        for contestant in stage.each(names, turn):
            with stage.tolerating(contestant.name):
                wait_ready(contestant)
                up.append((contestant, stack.enter_context(detached(contestant, IDLE))))
                wait_ready(contestant)
        for contestant, name in up:
            with stage.tolerating(contestant.name):
                taken = [execute(contestant.exec(name, HELLO)).first_s for _ in range(4)]
                yield EXEC, contestant.name, median(taken[1:])  # the first one loads what the others find
        time.sleep(SETTLE_S)
        for contestant, name in up:
            with stage.tolerating(contestant.name):
                parts = pss_mib_by_part(contestant, name)
                yield PSS, contestant.name, sum(parts.values())
                for part, metric in PSS_PARTS.items():
                    if part in parts:
                        yield metric, contestant.name, parts[part]


def _ctr(stage: Stage, names: Sequence[str], turn: int) -> Iterator[Reading]:
    """Through containerd: a start, an exec, and what the shim takes."""
    for contestant in stage.each(names, turn):
        with stage.tolerating(contestant.name):
            outcomes = [run_one(contestant, HELLO) for _ in range(3)]
            yield CTR, contestant.name, median(one.first_s for one in outcomes)
            yield CTR_END, contestant.name, median(one.end_s for one in outcomes)
            with detached(contestant, IDLE) as name:
                taken = [execute(contestant.exec(name, HELLO)).first_s for _ in range(4)]
                yield EXEC, contestant.name, median(taken[1:])
                if contestant.name == CTR_KATAPOD:
                    yield SHIM_MEMORY, contestant.name, shim_resident_mib(name)
                    yield SHIM_START, contestant.name, start_of_shim(stage.scratch).end_s


@dataclass(frozen=True)
class AtOnce:
    """`count` containers started together."""

    count: int

    def metrics(self) -> tuple[Metric, ...]:
        head = f"{self.count} at once"
        return (
            Metric(f"{head}, first output", "s", base=RAW),
            Metric(f"{head}, last output", "s", base=RAW),
            Metric(f"{head}, all done", "s", base=RAW),
            Metric(f"{head}, failures", "failed", budgets=dict.fromkeys(RUNTIMES, 0.0)),
        )

    def __call__(self, stage: Stage, names: Sequence[str], turn: int) -> Iterator[Reading]:
        first, last, done, failed = self.metrics()
        for contestant in stage.each(names, turn):
            began = time.monotonic()
            outcomes = run_containers(contestant, HELLO, self.count)
            good = [outcome for outcome in outcomes if outcome.good]
            yield failed, contestant.name, self.count - len(good)
            stage.failures += [f"{contestant.name}: {one.why()}" for one in outcomes if not one.good]
            if good:
                yield first, contestant.name, min(one.began + one.first_s for one in good) - began
                yield last, contestant.name, max(one.began + one.first_s for one in good) - began
                yield done, contestant.name, max(one.began + one.end_s for one in good) - began


RATE = {
    lanes: Metric(title, "per min", base=("", "runsc"), better="more")
    for lanes, title in ((1, "starts, one after the other"), (2, "starts, two lanes"))
}
STARTS = 6


def _rate(stage: Stage, names: Sequence[str], turn: int) -> Iterator[Reading]:
    """From the first start to the last end: teardown counts."""
    for contestant in stage.each(names, turn):
        for lanes, metric in RATE.items():
            with stage.tolerating(contestant.name):
                wait_ready(contestant)
                outcomes = run_containers(contestant, HELLO, STARTS, lanes)
                taken = max(one.began + one.end_s for one in outcomes) - outcomes[0].began
                for outcome in outcomes:
                    outcome.require_good()
                yield metric, contestant.name, 60 * STARTS / taken
                wait_ready(contestant)


FILES = Metric(
    "5,000 small files created",
    "s",
    base=("", "runsc"),
    budgets={IMAGE: 1.0},
)
SYNCS = Metric("200 writes of 4 KiB, each synchronous", "s", base=("", "runc"))
FSYNC = Metric("64 MiB written, then fsync", "s", base=("", "runc"))
DISK_SCRIPT = f"""
set -e
mkdir /tmp/files; cd /tmp/files
echo begin
i=0; while [ $i -lt 5000 ]; do echo $i > $i; i=$((i+1)); done
echo files
cd /; rm -r /tmp/files
echo removed
{DD} if=/dev/zero of=/tmp/small bs=4k count=200 oflag=dsync 2>/dev/null
echo small
{DD} if=/dev/zero of=/tmp/large bs=1M count=64 conv=fsync 2>/dev/null
echo large
rm /tmp/small /tmp/large
"""


def _disk(stage: Stage, names: Sequence[str], turn: int) -> Iterator[Reading]:
    """Times between lines of output, as they arrive here: no clock of a guest is asked."""
    for contestant in stage.each(names, turn):
        with stage.tolerating(contestant.name):
            outcome = run_one(contestant, ("sh", "-c", DISK_SCRIPT))
            yield FILES, contestant.name, outcome.until("files") - outcome.until("begin")
            yield SYNCS, contestant.name, outcome.until("small") - outcome.until("removed")
            yield FSYNC, contestant.name, outcome.until("large") - outcome.until("small")


SHARE_MB = 256
WRITE, READ = (
    Metric(f"{SHARE_MB} MB {verb} on a share", "MB/s", base=("", BY_HAND), better="more", budgets={SHARED: 0.95})
    for verb in ("written, then fsync,", "read, not from a cache,")
)
SHARE_SCRIPT = f"""
{DD} if=/dev/zero of={SHARE}/warm bs=1M count=1 2>/dev/null
echo begin
{DD} if=/dev/zero of={SHARE}/data bs=1000000 count={SHARE_MB} conv=fsync 2>/dev/null
echo written
{DD} if={SHARE}/data of=/dev/null bs=1M iflag=direct 2>/dev/null
echo read
rm {SHARE}/data {SHARE}/warm
"""


def _share(stage: Stage, names: Sequence[str], turn: int) -> Iterator[Reading]:
    """One after the other, each twice: the better one counts, since the disk below is shared with all others."""
    for who in names:
        with stage.tolerating(who):
            outcomes = []
            for _ in range(2):
                if who == BY_HAND and stage.by_hand is not None:
                    outcomes.append(stage.by_hand())
                elif who in stage.contestants:
                    outcomes.append(run_one(stage.contestants[who], ("sh", "-c", SHARE_SCRIPT)))
            for metric, begin, end in ((WRITE, "begin", "written"), (READ, "written", "read")):
                if outcomes:
                    yield metric, who, SHARE_MB / min(one.until(end) - one.until(begin) for one in outcomes)


def with_python(name: str) -> str:
    """The contestant of this name, with a root file system that has Python."""
    return f"{name} on Debian"


PYTHON, PYTHON_AGAIN = (
    Metric(f"python3 with imports{more}", "s", base=("", with_python("runc"))) for more in ("", " again")
)
PYTHON_SCRIPT = """
echo begin
python3 -c 'import argparse, logging, subprocess'
echo once
python3 -c 'import argparse, logging, subprocess'
echo again
"""


def _python(stage: Stage, names: Sequence[str], turn: int) -> Iterator[Reading]:
    for contestant in stage.each(names, turn):
        with stage.tolerating(contestant.name):
            outcome = run_one(contestant, ("sh", "-ec", PYTHON_SCRIPT))
            yield PYTHON, contestant.name, outcome.until("once") - outcome.until("begin")
            yield PYTHON_AGAIN, contestant.name, outcome.until("again") - outcome.until("once")


def all_suites() -> tuple[Suite, ...]:
    twenty, forty = AtOnce(20), AtOnce(40)
    about = "the root file system: of Katapod's image, of an OCI bundle"
    pythons = tuple(with_python(name) for name in (*PEERS, IMAGE, BUNDLE))
    return (
        Suite("boot", "QEMU by hand, until it has powered off", (BOOT,), ("bzImage", "PVH"), _boots),
        Suite("start", "one container", (START, START_END), RUNTIMES, _starts),
        Suite(
            "containerd",
            "one container through containerd",
            (CTR, CTR_END, EXEC, SHIM_START, SHIM_MEMORY),
            (CTR_RUNC, CTR_KATAPOD),
            _ctr,
        ),
        Suite("idle", "a running container", (EXEC, PSS, *PSS_PARTS.values()), RUNTIMES, _idle),
        Suite("disk", about, (FILES, SYNCS, FSYNC), (*PEERS, IMAGE, BUNDLE), _disk, rounds=2),
        Suite("rate", "starts a minute", tuple(RATE.values()), (*PEERS, *RUNTIMES[4:]), _rate, rounds=2),
        Suite("20 at once", "20 containers", twenty.metrics(), (*PEERS, "Katapod template"), twenty, rounds=2),
        Suite("40 at once", "40 containers", forty.metrics(), (*PEERS, "Katapod template"), forty, rounds=1),
        Suite("cold", "20 containers, no template", twenty.metrics(), ("Katapod cold",), twenty, rounds=1, extra=True),
        Suite("share", "virtio-fs, beside QEMU by hand", (WRITE, READ), (BY_HAND, SHARED), _share, extra=True),
        Suite("python", "a program of many files", (PYTHON, PYTHON_AGAIN), pythons, _python, extra=True),
    )
