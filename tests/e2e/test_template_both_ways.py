"""What every start is for, on a clone of a template and on a guest that has booted: no difference may be seen."""

import json
import time
from pathlib import Path

import pytest
from faults import fresh_name, record_of
from faults import kata as run_once

from kit.kata import Kata

pytestmark = pytest.mark.usefixtures("templates")


@pytest.fixture(scope="module")
def box(module_kata: Kata, templates: bool) -> str:
    """A container with limits beyond the template's size; `templates` says how its guest was made."""
    name = module_kata.start("-m", "512m", "--cpus", "2", "busybox", "sh", "-c", "echo logged; exec sleep 1000")
    assert bool(record_of(name)["template"]) is templates
    return name


def test_streams_and_status(kata: Kata) -> None:
    result = kata.run("-i", "busybox", "sh", "-c", "cat; echo word >&2; exit 3", input="line\n")
    assert (result.code, result.stdout, result.stderr) == (3, "line\n", "word\n")


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


def test_names(kata: Kata, box: str) -> None:
    assert kata.ok("exec", box, "hostname") == f"{box}\n"
    assert kata.ok("exec", box, "cat", "/etc/hostname") == f"{box}\n"
    assert kata.ok("run", "--rm", "--name", kata.name(), "-h", "other", "busybox", "uname", "-n") == "other\n"


def test_clock(kata: Kata) -> None:
    """The clock of a clone stands where its template's stood, until it is set."""
    before = time.time()
    told = float(kata.ok("run", "--rm", "--name", kata.name(), "busybox", "date", "+%s"))
    assert before - 1 <= told <= time.time() + 1


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


def test_volume(kata: Kata, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("from the host\n")
    script = "cat /v/in; echo from the guest > /v/out"
    volume = f"{tmp_path}:/v"
    assert (
        kata.ok("run", "--rm", "--name", kata.name(), "-v", volume, "busybox", "sh", "-c", script) == "from the host\n"
    )
    assert (tmp_path / "out").read_text() == "from the guest\n"


def test_kernel_and_memory_are_sound(kata: Kata) -> None:
    """What is in memory comes through: many programs, and data that is written, dropped and read again."""
    script = (
        "dd if=/dev/urandom of=/data bs=1M count=16 2>/dev/null; a=$(md5sum < /data); sync;"
        'for i in $(seq 50); do /bin/true || exit 1; done; b=$(md5sum < /data); test "$a" = "$b" && echo same'
    )
    assert kata.ok("run", "--rm", "--name", kata.name(), "busybox", "sh", "-c", script) == "same\n"


def test_trace_shows_host_and_guest_on_one_time_line(templates: bool, tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    done = run_once("run", "--rm", "--name", fresh_name("trace"), "busybox", "true", env={"KATAPOD_TRACE": str(file)})
    assert (done.code, done.err) == (0, ""), done
    events = json.loads(file.read_text())
    tracks = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    spans = {(tracks[event["tid"]], event["name"]): event for event in events if event["ph"] == "X"}
    assert (("host", "wake the clone") in spans) is templates
    assert (("host", "boot until the agent answers") in spans) is not templates
    first, last, served = spans["host", "interpreter"], spans["host", "stop QEMU"], spans["guest", "CreateContainer"]
    assert first["ts"] < served["ts"] < served["ts"] + served["dur"] < last["ts"]
