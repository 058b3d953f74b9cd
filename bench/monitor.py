"""What kata-monitor itself takes: the program, over sandboxes without a VM that the tests' kit serves.

They lie in a directory that is bound over /run/vc/sbs for kata-monitor alone. Their supervisors' work is not counted.
"""

import contextlib
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.measure import BenchError

__all__ = ["SANDBOXES", "MonitorCost", "monitor_cost"]

SANDBOXES = 30
REFRESHES, SCRAPES = 20, 5
PAUSE_S = 1.1  # answers are kept for a second
START_LIMIT_S = 30.0
SETUP = 'mount --make-rprivate / && mkdir -p /run/vc/sbs && mount --bind "$1" /run/vc/sbs && shift && exec "$@"'


@dataclass(frozen=True, slots=True)
class MonitorCost:
    refresh_cpu_s: float  # of one refresh of the page
    scrape_cpu_s: float
    resident_mib: float  # the most, after both


def monitor_cost(scratch: Path) -> MonitorCost:
    """Takes half a minute. Raises BenchError."""
    root = scratch / "monitor"
    root.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        fleet = stack.enter_context(_child([sys.executable, "-m", "kit.fleet", str(root), str(SANDBOXES)], "tests"))
        _line(fleet, "the sandboxes")
        program = str(Path(sys.executable).with_name("kata-monitor"))
        command = ["unshare", "-m", "sh", "-c", SETUP, "sh", str(root), program, "-listen-address", "127.0.0.1:0"]
        monitor = stack.enter_context(_child(command))
        base = _line(monitor, "kata-monitor").split()[-1]
        for path in ("metrics", "api/sandboxes"):
            _get(base + path)
        refresh = _cpu_each(monitor.pid, base + "api/sandboxes", REFRESHES)
        scrape = _cpu_each(monitor.pid, base + "metrics", SCRAPES)
        return MonitorCost(refresh, scrape, _peak_mib(monitor.pid))


@contextlib.contextmanager
def _child(command: list[str], path: str = "") -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | ({"PYTHONPATH": path} if path else {})
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(START_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _line(process: subprocess.Popen[str], what: str) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise BenchError(f"{what} did not start")
    return line


def _get(url: str) -> None:
    """As a browser or Prometheus asks: gzip is taken."""
    request = urllib.request.Request(url, headers={"Accept-Encoding": "gzip"})  # noqa: S310 - our own
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            answer.read()
    except (OSError, urllib.error.URLError) as error:
        raise BenchError(f"cannot read {url}: {error}") from error


def _cpu_each(pid: int, url: str, count: int) -> float:
    before = _cpu_s(pid)
    for _ in range(count):
        time.sleep(PAUSE_S)
        _get(url)
    return (_cpu_s(pid) - before) / count


def _cpu_s(pid: int) -> float:
    """In nanoseconds by the scheduler: clock ticks are too coarse for this. All threads."""
    folder = Path(f"/proc/{pid}/task")
    return sum(int((task / "schedstat").read_text().split()[0]) for task in folder.iterdir()) / 1e9


def _peak_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) / 1024
