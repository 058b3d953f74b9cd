"""Podman, and runtimes by the command line of OCI engines: runc, crun and Katapod, each called the same way.

CPU is what a command and the processes that it waited for took; what it leaves behind is not in it.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from bench.contestants import KATA
from bench.measure import BenchError, Outcome, execute, quietly
from bench.memory import parse_pss_mib
from bench.workload import Bundles

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from kit.podman import Podman, podman_here

__all__ = ["OCI_CRUN", "OCI_KATAPOD", "OCI_RUNC", "STEPS", "VERBS", "OciEngine", "oci_engine"]

OCI_RUNC, OCI_CRUN, OCI_KATAPOD = "Podman, runc", "Podman, crun", "Podman, Katapod"
PROGRAMS = {OCI_RUNC: "runc", OCI_CRUN: "crun", OCI_KATAPOD: KATA}
VERBS = ("create", "start", "state", "exec", "kill", "delete")
STEPS = 10  # of the built file
TIMES = 3  # each verb; the median counts
LIMIT_S = 120.0
NO_NETWORK = ("--network", "none")


class OciEngine:
    """`prefix`: where crun can work."""

    def __init__(self, podman: Podman, bundles: Bundles, scratch: Path, prefix: tuple[str, ...]) -> None:
        self._podman, self._bundles, self._scratch, self._prefix = podman, bundles, scratch, prefix
        self._root = Path("/run") / f"{scratch.name}-oci"
        self._count = 0

    def _call(self, who: str, *words: str) -> Outcome:
        return execute(self._podman.command(*words, runtime=PROGRAMS[who], before=self._before(who)))

    def _before(self, who: str) -> tuple[str, ...]:
        return self._prefix if who == OCI_CRUN else ()

    def run_s(self, who: str) -> float:
        """Seconds of `podman run --rm --network none IMAGE true`, until its end. Raises BenchError."""
        return self._call(who, "run", "--rm", *NO_NETWORK, self._podman.image, "true").end_s

    def build_s(self, who: str) -> float:
        """Seconds of a build of STEPS steps, one of which is FROM."""
        folder = self._scratch / "build"
        folder.mkdir(exist_ok=True)
        steps = "".join(f"RUN echo {number} > /bin/step{number}\n" for number in range(1, STEPS))
        (folder / "Containerfile").write_text(f"FROM {self._podman.image}\n{steps}")
        words = ("build", "-q", "--no-cache", *NO_NETWORK, "-t", "localhost/built:1", str(folder))
        try:
            return self._call(who, *words).end_s
        finally:
            quietly(self._podman.command("rmi", "-f", "localhost/built:1"))

    @contextlib.contextmanager
    def running(self, who: str) -> Iterator[str]:
        """A container in the background, by its id."""
        self._count += 1
        name = f"bench{self._count}"
        self._call(who, "run", "-d", "--name", name, *NO_NETWORK, self._podman.image, "sleep", "1000")
        try:
            yield name
        finally:
            words = ("rm", "-f", "-t", "0", name)
            quietly(self._podman.command(*words, runtime=PROGRAMS[who], before=self._before(who)))

    def exec_s(self, who: str, name: str) -> float:
        return median(self._call(who, "exec", name, "true").end_s for _ in range(TIMES))

    def memory_mib(self, name: str) -> tuple[float, float]:
        """PSS of Katapod's proxy and of its supervisor."""
        found = json.loads(self._podman.ok("inspect", name))[0]
        record = json.loads(Path(f"/run/vc/sbs/{found['Id']}/persist.json").read_text())
        proxy, supervisor = (
            parse_pss_mib(Path(f"/proc/{pid}/smaps_rollup").read_text())
            for pid in (found["State"]["Pid"], record["supervisor_pid"])
        )
        return proxy, supervisor

    def cpu_ms(self, who: str) -> dict[str, float]:
        """For each of VERBS. Raises BenchError."""
        taken: dict[str, list[float]] = {verb: [] for verb in VERBS}
        for _ in range(TIMES):
            self._count += 1
            self._life(who, f"bench-{os.getpid()}-{self._count}", taken)
        return {verb: median(values) for verb, values in taken.items()}

    def _life(self, who: str, name: str, taken: dict[str, list[float]]) -> None:
        bundle = self._bundles.bundle(("sleep", "1000"))
        words = {
            "create": ("--bundle", str(bundle), name),
            "start": (name,),
            "state": (name,),
            "exec": (name, "true"),
            "kill": (name, "KILL"),
            "delete": (name,),
        }
        call = [*self._before(who), PROGRAMS[who], "--root", str(self._root)]
        try:
            for verb in VERBS:
                if verb == "delete":
                    self._wait_stopped(call, name)
                taken[verb].append(_cpu_ms([*call, verb, *words[verb]]))
        finally:
            quietly([*call, "delete", "--force", name])

    def _wait_stopped(self, call: list[str], name: str) -> None:
        deadline = time.monotonic() + LIMIT_S
        while json.loads("".join(line for _, line in execute([*call, "state", name]).lines))["status"] != "stopped":
            if time.monotonic() > deadline:
                raise BenchError(f"{name} has not stopped after {LIMIT_S:.0f} s")
            time.sleep(0.02)


def _cpu_ms(argv: Sequence[str]) -> float:
    """User and system time, in milliseconds; its streams are none, as a container would keep a pipe open."""
    process = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise BenchError(f"{' '.join(argv[-4:])}: status {process.returncode}")
    return (used.ru_utime + used.ru_stime) * 1000


@contextlib.contextmanager
def oci_engine(bundles: Bundles, scratch: Path, prefix: tuple[str, ...]) -> Iterator[OciEngine]:
    """Podman with a storage of its own until the end of the block. Raises BenchError."""
    try:
        with podman_here() as podman:
            yield OciEngine(podman, bundles, scratch, prefix)
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        raise BenchError(f"cannot use Podman: {error}") from error
