"""What every start is for, on a clone of a template and on a guest that has booted: no difference may be seen."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from faults import Finished, fresh_name, record_of
from faults import kata as run_once

from kit.kata import Kata

pytestmark = [pytest.mark.usefixtures("templates"), pytest.mark.qemu("templates")]


@pytest.fixture(scope="module")
def box(module_kata: Kata, templates: bool) -> str:
    """A container with limits beyond the template's size; `templates` says how its guest was made."""
    name = module_kata.start("-m", "512m", "--cpus", "2", "busybox", "sh", "-c", "echo logged; exec sleep 1000")
    assert bool(record_of(name)["template"]) is templates
    return name


@dataclass(frozen=True)
class Ran:
    """A `run` that does all that needs a start of its own; a line of its output is what a test looks at."""

    done: Finished
    began: float
    ended: float
    volume: Path
    trace: Path

    def line(self, number: int) -> str:
        return self.done.out.splitlines()[number]


SOUND = (
    "dd if=/dev/urandom of=/data bs=1M count=16 2>/dev/null; a=$(md5sum < /data); sync; "
    'for i in $(seq 50); do /bin/true || exit 1; done; b=$(md5sum < /data); test "$a" = "$b" && echo same'
)
SCRIPT = f"cat; echo word >&2; uname -n; date +%s; cat /v/in; echo from the guest > /v/out; {SOUND}; exit 3"


@pytest.fixture(scope="module")
def ran(templates: bool, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("ran")
    volume, trace = folder / "volume", folder / "trace.json"
    volume.mkdir()
    (volume / "in").write_text("from the host\n")
    words = ("run", "--rm", "-i", "--name", fresh_name("ran"), "-h", "other", "-v", f"{volume}:/v")
    began = time.time()
    done = run_once(*words, "busybox", "sh", "-c", SCRIPT, input="line\n", env={"KATAPOD_TRACE": str(trace)})
    return Ran(done, began, time.time(), volume, trace)


def test_streams_and_status(ran: Ran) -> None:
    assert (ran.done.code, ran.line(0), ran.done.err) == (3, "line", "word\n")
    assert len(ran.done.out.splitlines()) == 5


def test_exec(kata: Kata, box: str) -> None:
    result = kata("exec", "-i", box, "sh", "-c", "cat; exit 4", input="line\n")
    assert (result.code, result.stdout, result.stderr) == (4, "line\n", "")


def test_size_of_the_guest(kata: Kata, box: str) -> None:
    """A template has one vCPU and 256 MiB; its clone grows to what was asked for."""
    assert kata.ok("exec", box, "nproc") == "2\n"
    assert kata.ok("exec", box, "cat", "/sys/fs/cgroup/memory.max") == f"{512 << 20}\n"
    total_mib = int(kata.ok("exec", box, "sed", "-n", "s/MemTotal: *//p", "/proc/meminfo").split()[0]) >> 10
    row = kata.listed(box)
    assert (row["vcpus"], row["memory_mib"]) == (2, 768)
    assert 512 < total_mib <= 768


def test_names(kata: Kata, box: str, ran: Ran) -> None:
    assert kata.ok("exec", box, "hostname") == f"{box}\n"
    assert kata.ok("exec", box, "cat", "/etc/hostname") == f"{box}\n"
    assert ran.line(1) == "other"


def test_clock(ran: Ran) -> None:
    """The clock of a clone stands where its template's stood, until it is set."""
    assert ran.began - 1 <= float(ran.line(2)) <= ran.ended + 1


def test_time_since_boot_goes_on(kata: Kata, box: str) -> None:
    first, second = (float(kata.ok("exec", box, "cat", "/proc/uptime").split()[0]) for _ in range(2))
    assert 0 < first < second


def test_pause_and_resume(kata: Kata, box: str) -> None:
    kata.ok("pause", box)
    assert kata.listed(box)["state"] == "paused"
    kata.ok("resume", box)
    assert kata.ok("exec", box, "echo", "awake") == "awake\n"


def test_stats(kata: Kata, box: str) -> None:
    (row,) = json.loads(kata.ok("stats", "--json", box))
    assert row["memory_limit_bytes"] == 512 << 20
    assert row["memory_bytes"] > 0


def test_logs(kata: Kata, box: str) -> None:
    assert kata.ok("logs", box) == "logged\n"


def test_volume(ran: Ran) -> None:
    assert ran.line(3) == "from the host"
    assert (ran.volume / "out").read_text() == "from the guest\n"


def test_kernel_and_memory_are_sound(ran: Ran) -> None:
    """What is in memory comes through: many programs, and data that is written, dropped and read again."""
    assert ran.line(4) == "same"


def test_trace_shows_host_and_guest_on_one_time_line(templates: bool, ran: Ran) -> None:
    events = json.loads(ran.trace.read_text())
    tracks = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    spans = {(tracks[event["tid"]], event["name"]): event for event in events if event["ph"] == "X"}
    assert (("host", "wake the clone") in spans) is templates
    assert (("host", "boot until the agent answers") in spans) is not templates
    first, last, served = spans["host", "interpreter"], spans["host", "stop QEMU"], spans["guest", "CreateContainer"]
    assert first["ts"] < served["ts"] < served["ts"] + served["dur"] < last["ts"]
