"""What processes use, and which part of it helpers of the first one add."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from katapod.observe.process_metrics import process_text
from katapod.observe.process_use import process_use

BUSY = """
import subprocess, sys
subprocess.run([sys.executable, "-c", "import time\\nwhile time.process_time() < 0.3: pass"])
print(flush=True)
input()
"""


@pytest.fixture
def parent() -> Iterator[int]:
    """A process whose child has used 0.3 s of CPU and has ended."""
    with subprocess.Popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        os.kill(process.pid, signal.SIGSTOP)  # what it has does not change between two looks
        os.waitpid(process.pid, os.WUNTRACED)
        yield process.pid
        process.kill()


def test_helpers_add_no_memory(parent: int) -> None:
    alone, own_cpu_s = process_use([parent]), process_use([os.getpid()]).cpu_s
    helped = process_use([parent], [os.getpid()])
    assert alone.private > 0
    assert helped.private == alone.private
    assert helped.cpu_s > alone.cpu_s + own_cpu_s - 0.001  # as floats are added


def test_cpu_time_of_helpers_that_have_ended_counts(parent: int) -> None:
    """Else a counter would fall whenever a program in the guest ends."""
    assert process_use([parent], []).cpu_s >= process_use([parent]).cpu_s + 0.25


def test_metrics_have_what_helpers_map_only_once(parent: int) -> None:
    def values(text: str) -> dict[str, float]:
        rows = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in rows}

    alone, helped = values(process_text("x", "x", [parent])), values(process_text("x", "x", [parent], [os.getpid()]))
    assert helped['x_proc_status{item="vmrss"}'] == alone['x_proc_status{item="vmrss"}']
    assert helped["x_threads"] > alone["x_threads"]
    assert helped["x_fds"] > alone["x_fds"]
