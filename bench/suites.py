"""What is measured in a round. A suite takes one sample of each of its metrics from each contestant.

Suites yield readings as they come. A contestant that fails loses the sample, and the others go on.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from bench.containerd import CTR_EMULATED, CTR_KATAPOD, CTR_RUNC, Ctr, shim_resident_mib, start_of_shim
from bench.contestants import COLD, DEFAULT, PEERS, POOL, TEMPLATE, UML, UML_POOL, Contestant
from bench.measure import BenchError, Outcome, detached, execute, run_containers, run_one
from bench.memory import KATAPOD_PARTS, pss_mib_by_part
from bench.monitor import SANDBOXES, monitor_cost
from bench.network import BY_HAND_NET, SENT_MB, PodNetns, pod_of, readings
from bench.oci import OCI_CRUN, OCI_KATAPOD, OCI_RUNC, STEPS, VERBS, OciEngine
from bench.pods import CRI_EMULATED, CRI_KATAPOD, CRI_RUNC, PodEngine
from bench.pool import wait_ready
from bench.programs import (
    BUSY_COUNTS,
    BUSY_S,
    PROGRAMS_SCRIPT,
    WORK,
    busy_script,
    program_readings,
    programs,
)
from bench.raw_boot import RawBoot
from bench.rows import Metric
from bench.share import (
    BY_HAND,
    CTR_ROOT,
    CTR_RUNC_SHARED,
    CTR_SHARED,
    CTR_SHARED_EMULATED,
    SHARE_METRICS,
    SHARE_SCRIPT,
    SHARED,
    share_readings,
)
from bench.workload import DD

__all__ = ["RAW", "Reading", "Stage", "Suite", "all_suites"]

RAW = ("raw boot", "bzImage")
HELLO = ("echo", "hello")
IDLE = ("sleep", "1000")
SETTLE_S = 3.0  # until an idle guest has given back what it freed
OURS = (COLD, TEMPLATE, POOL, UML, UML_POOL, DEFAULT)
IMAGE, BUNDLE, EMULATED = "Katapod image", "Katapod bundle", "Katapod by emulation"

Reading = tuple[Metric, str, float]
"""What was measured, of whom, and the value."""


@dataclass
class Stage:
    """What suites work with: who takes part, and who failed at what."""

    raw: RawBoot
    contestants: dict[str, Contestant]
    failures: list[str] = field(default_factory=list)
    by_hand: Callable[[], Outcome] | None = None  # the script of the share, in a VM without Katapod
    network_by_hand: Callable[[], contextlib.AbstractContextManager[PodNetns]] | None = None
    pods: PodEngine | None = None
    oci: OciEngine | None = None
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
    budgets={COLD: 1.6, TEMPLATE: 0.5, POOL: 0.09, UML: 0.3, UML_POOL: 0.053, DEFAULT: 0.3},
    against=dict.fromkeys((TEMPLATE, POOL, UML, UML_POOL), ("runsc", 5.0)),
)
START_END = Metric("run until its end", "s", base=RAW)


def _starts(stage: Stage, names: Sequence[str], turn: int) -> Iterator[Reading]:
    for contestant in stage.each(names, turn):
        first, whole = [], []
        with stage.tolerating(contestant.name):
            for _ in range(1 if contestant.name == COLD else 3):
                wait_ready(contestant)
                outcome = run_one(contestant, HELLO)
                first.append(outcome.first_s)
                whole.append(outcome.end_s)
            wait_ready(contestant)
            yield START, contestant.name, median(first)
            yield START_END, contestant.name, median(whole)


BY_QEMU, BY_UML = (COLD, TEMPLATE, POOL, CTR_EMULATED), (UML, UML_POOL, DEFAULT, CTR_KATAPOD)
EXEC = Metric(
    "exec until output",
    "s",
    base=RAW,
    budgets=dict.fromkeys(BY_QEMU, 0.066) | dict.fromkeys(BY_UML, 0.026),
)
CTR = Metric("ctr run until output", "s", base=RAW, budgets={CTR_KATAPOD: 0.3, CTR_EMULATED: 0.5})
CTR_END = Metric("ctr run until its end", "s", base=RAW)
SHIM_START = Metric("shim, start until its address", "s", budgets={CTR_KATAPOD: 0.04})
SHIM_MEMORY = Metric("shim, resident", "MiB", budgets={CTR_KATAPOD: 30.0})
PSS = Metric(
    "idle PSS, all",
    "MiB",
    budgets=dict.fromkeys((COLD, TEMPLATE, POOL), 120.0) | {UML: 75.0, UML_POOL: 75.0, DEFAULT: 90.0},
)
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


POD_START = Metric(
    "CRI pod until its workload's output", "s", base=("", CRI_RUNC), budgets={CRI_KATAPOD: 3.0, CRI_EMULATED: 5.0}
)
POD_END = Metric("CRI pod, stopped and removed", "s", base=("", CRI_RUNC))


def _pods(stage: Stage, names: Sequence[str], turn: int) -> Iterator[Reading]:
    """RunPodSandbox, CreateContainer and StartContainer, until the log has the workload's line."""
    for who in names:
        if stage.pods is None:
            return
        with stage.tolerating(who):
            taken = [stage.pods.start_and_end(who) for _ in range(3)]
            yield POD_START, who, median(start for start, _ in taken)
            yield POD_END, who, median(end for _, end in taken)


PODMAN_RUN = Metric("podman run until its end", "s", base=("", OCI_RUNC))
PODMAN_EXEC = Metric("podman exec until its end", "s", base=("", OCI_RUNC))
PODMAN_BUILD = Metric(f"podman build of {STEPS} steps", "s", base=("", OCI_RUNC))
QUICK = ("start", "state", "kill", "delete")
VERB_CPU = {verb: Metric(f"{verb}, CPU", "ms", budgets={OCI_KATAPOD: 60.0} if verb in QUICK else {}) for verb in VERBS}
PROXY = Metric("proxy of a container, PSS", "MiB", budgets={OCI_KATAPOD: 6.0})
SUPERVISOR = Metric("supervisor of OCI commands, PSS", "MiB")


def _oci(stage: Stage, names: Sequence[str], turn: int) -> Iterator[Reading]:
    """By Podman, and each verb of the runtime by itself."""
    for who in names:
        if (engine := stage.oci) is None:
            return
        with stage.tolerating(who):
            yield PODMAN_RUN, who, median(engine.run_s(who) for _ in range(3))
            with engine.running(who) as name:
                yield PODMAN_EXEC, who, engine.exec_s(who, name)
                if who == OCI_KATAPOD:
                    proxy, supervisor = engine.memory_mib(name)
                    yield PROXY, who, proxy
                    yield SUPERVISOR, who, supervisor
            for verb, taken_ms in engine.cpu_ms(who).items():
                yield VERB_CPU[verb], who, taken_ms
            if turn == 0:
                yield PODMAN_BUILD, who, engine.build_s(who)


INTO, OUT_OF = (
    Metric(
        f"{SENT_MB} MB {way} the pod",
        "MB/s",
        base=("", BY_HAND_NET),
        better="more",
        budgets=dict.fromkeys((CTR_KATAPOD, CTR_EMULATED), 0.95),
    )
    for way in ("into", "out of")
)
ROUND_TRIP = Metric("round trip to the pod", "ms", base=("", BY_HAND_NET))


def _network(stage: Stage, names: Sequence[str], turn: int) -> Iterator[Reading]:
    """Each alone, one after the other: they share the host's CPUs with who asks them."""
    for who in names:
        contestant = stage.contestants.get(who)
        with stage.tolerating(who), contextlib.ExitStack() as stack:
            if who == BY_HAND_NET and stage.network_by_hand is not None:
                netns = stack.enter_context(stage.network_by_hand())
            elif isinstance(contestant, Ctr):
                netns = stack.enter_context(pod_of(contestant))
            else:
                continue
            found = readings(netns)
            yield INTO, who, found.into
            yield OUT_OF, who, found.out_of
            yield ROUND_TRIP, who, found.round_trip_ms


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
            Metric(f"{head}, failures", "failed", budgets=dict.fromkeys((*OURS, CTR_KATAPOD), 0.0)),
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


def _share(stage: Stage, names: Sequence[str], turn: int) -> Iterator[Reading]:
    """One after the other; each round begins with another one."""
    first = turn % len(names)
    for who in (*names[first:], *names[:first]):
        with stage.tolerating(who):
            if who == BY_HAND and stage.by_hand is not None:
                outcome = stage.by_hand()
            elif who in stage.contestants:
                outcome = run_one(stage.contestants[who], ("sh", "-c", SHARE_SCRIPT))
            else:
                continue
            for metric, value in share_readings(outcome):
                yield metric, who, value


def with_python(name: str) -> str:
    """The contestant of this name, with a root file system that has Python."""
    return f"{name} on Debian"


PROGRAMS = programs(with_python("runc"), (with_python(IMAGE), with_python(BUNDLE)))


def _programs(stage: Stage, names: Sequence[str], turn: int) -> Iterator[Reading]:
    """One after the other in one container, each until its line of output."""
    for contestant in stage.each(names, turn):
        with stage.tolerating(contestant.name):
            outcome = run_one(contestant, ("sh", "-c", PROGRAMS_SCRIPT))
            for program, taken_s in program_readings(outcome):
                yield PROGRAMS[program], contestant.name, taken_s


def _busy(stage: Stage, names: Sequence[str], turn: int) -> Iterator[Reading]:
    """So many containers at once, each at work for as long as the others: what all of them got done."""
    for contestant in stage.each(names, turn):
        for count in BUSY_COUNTS:
            with stage.tolerating(contestant.name):
                outcomes = run_containers(contestant, ("sh", "-c", busy_script()), count)
                for outcome in outcomes:
                    outcome.require_good()
                done = sum(int(outcome.lines[-1][1]) for outcome in outcomes)
                yield WORK[count], contestant.name, done * 60 / BUSY_S


MONITOR = "kata-monitor"
MONITOR_CPU = Metric(
    f"{SANDBOXES} sandboxes on the page, CPU at a refresh each 5 s", "% of a core", budgets={MONITOR: 1.0}
)
MONITOR_SCRAPE = Metric(f"{SANDBOXES} sandboxes scraped, CPU", "ms")
MONITOR_MEMORY = Metric(f"{SANDBOXES} sandboxes watched, resident at most", "MiB", budgets={MONITOR: 60.0})


def _monitor(stage: Stage, names: Sequence[str], turn: int) -> Iterator[Reading]:
    for name in names:
        with stage.tolerating(name):
            cost = monitor_cost(stage.scratch)
            yield MONITOR_CPU, name, cost.refresh_cpu_s / 5 * 100
            yield MONITOR_SCRAPE, name, cost.scrape_cpu_s * 1000
            yield MONITOR_MEMORY, name, cost.resident_mib


def all_suites() -> tuple[Suite, ...]:
    twenty, forty = AtOnce(20), AtOnce(40)
    about = "the root file system: of Katapod's image, of an OCI bundle"
    pythons = tuple(with_python(name) for name in ("runc", "runsc", IMAGE, BUNDLE, EMULATED))
    return (
        Suite("boot", "QEMU by hand, until it has powered off", (BOOT,), ("bzImage", "PVH"), _boots),
        Suite("start", "one container", (START, START_END), (*PEERS, *OURS), _starts),
        Suite(
            "containerd",
            "one container through containerd",
            (CTR, CTR_END, EXEC, SHIM_START, SHIM_MEMORY),
            (CTR_RUNC, CTR_KATAPOD, CTR_EMULATED),
            _ctr,
        ),
        Suite(
            "pods",
            "a pod and its workload, by the CRI",
            (POD_START, POD_END),
            (CRI_RUNC, CRI_KATAPOD, CRI_EMULATED),
            _pods,
        ),
        Suite(
            "oci",
            "Podman, and runtimes as it calls them",
            (PODMAN_RUN, PODMAN_EXEC, PODMAN_BUILD, *VERB_CPU.values(), PROXY, SUPERVISOR),
            (OCI_RUNC, OCI_CRUN, OCI_KATAPOD),
            _oci,
            rounds=3,
        ),
        Suite(
            "network",
            "a pod's network, by veth alone, by tap and tc by hand, and Katapod's",
            (INTO, OUT_OF, ROUND_TRIP),
            (CTR_RUNC, BY_HAND_NET, CTR_KATAPOD, CTR_EMULATED),
            _network,
            rounds=2,
        ),
        Suite("20 through containerd", "20 by ctr run", twenty.metrics(), (CTR_RUNC, CTR_KATAPOD), twenty, rounds=1),
        Suite("idle", "a running container", (EXEC, PSS, *PSS_PARTS.values()), (*PEERS, *OURS), _idle),
        Suite(
            "monitor", "kata-monitor's own cost", (MONITOR_CPU, MONITOR_SCRAPE, MONITOR_MEMORY), (MONITOR,), _monitor, 1
        ),
        Suite("disk", about, (FILES, SYNCS, FSYNC), (*PEERS, IMAGE, BUNDLE, EMULATED), _disk, rounds=2),
        Suite(
            "rate", "starts a minute", tuple(RATE.values()), (*PEERS, TEMPLATE, POOL, UML, UML_POOL), _rate, rounds=2
        ),
        Suite("20 at once", "20 containers", twenty.metrics(), (*PEERS, TEMPLATE, UML), twenty, rounds=2),
        Suite("40 at once", "40 containers", forty.metrics(), (*PEERS, TEMPLATE, UML), forty, rounds=1),
        Suite("cold", "20 containers, no template", twenty.metrics(), (COLD,), twenty, rounds=1, extra=True),
        Suite(
            "share",
            "virtio-fs, beside the same QEMU and virtiofsd by hand",
            SHARE_METRICS,
            (BY_HAND, SHARED, CTR_SHARED, CTR_ROOT, CTR_SHARED_EMULATED, CTR_RUNC_SHARED),
            _share,
            rounds=3,
        ),
        Suite("programs", "real programs, in one container", tuple(PROGRAMS.values()), pythons, _programs, rounds=2),
        Suite(
            "busy", f"all at work for {BUSY_S} s", tuple(WORK.values()), ("runsc", UML, TEMPLATE), _busy, 1, extra=True
        ),
    )
