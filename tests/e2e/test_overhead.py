"""`kata-runtime overhead`, and guest memory that goes back to the host."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from faults import SHARED

from katapod.kernel.process import share_memory
from katapod.observe.memory_use import family
from kit.kata import Kata, wait_for

MIB = 1024  # KiB
MANY_FILES = """BEGIN {
    text = "a"
    while (length(text) < 31 * 1024)
        text = text text
    text = substr(text, 1, 31 * 1024 - 1)
    for (i = 0; i < 800; i++) {
        file = "/load/" i
        print text > file
        close(file)
    }
}"""
"""By one process: each that an emulated guest starts takes long."""


@pytest.fixture
def kept(kata: Kata) -> str:
    return kata.start("-m", "256m", *SHARED, "--tmpfs", "/load:size=200m", "busybox", "sleep", "1000")


def pss_kib(listed: dict[str, Any]) -> int:
    """The sum over the sandbox's processes, as the kernel rolls it up. A helper of User-mode Linux that shares the
    kernel's address space has the same pages, and would be a second sum of them."""
    total, vmm = 0, listed["vmm_pid"]
    for pid in family([listed["supervisor_pid"], vmm]):
        if pid != vmm and share_memory(vmm, pid):
            continue
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        total += sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return total


def measured(kata: Kata, *words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(kata.ok("overhead", "--json", *words))
    return found


def guest_kib(report: dict[str, Any]) -> int:
    memory = report["observations"][-1]["memory"]
    return int(memory["guest_mapped_kib"] + memory["guest_unmapped_kib"])


def test_of_a_running_sandbox(kata: Kata, kept: str) -> None:
    report = measured(kata, "--from", kept)
    (seen,) = report["observations"]
    total = sum(seen["memory"].values())
    # shared pages count less the more sandboxes run: others may have started or ended in between
    assert total >= 0.8 * pss_kib(kata.listed(kept))
    assert seen["memory"]["virtiofsd_kib"] > 0
    assert seen["memory"]["supervisor_kib"] > 5 * MIB
    assert total > seen["containers_kib"] > 0
    assert report["memory_mib"] * MIB >= total - seen["containers_kib"]
    assert report["memory_mib"] <= report["ceiling_mib"]


@pytest.mark.qemu("memory that goes back to the host")
def test_what_the_guest_frees_goes_back_to_the_host(kata: Kata, kept: str) -> None:
    """Of small files every other one of many is removed: there are no large free blocks to give back."""
    before = guest_kib(measured(kata, "--from", kept))
    kata.ok("exec", kept, "awk", MANY_FILES)
    full = guest_kib(measured(kata, "--from", kept))
    assert full > before + 20 * MIB
    kata.ok("exec", kept, "sh", "-c", "rm /load/*[13579]")
    wait_for(lambda: guest_kib(measured(kata, "--from", kept)) < full - 7 * MIB, "half of it is given back")

    before = guest_kib(measured(kata, "--from", kept))
    kata.ok("exec", kept, "sh", "-c", "dd if=/dev/zero of=/load/x bs=1M count=128 2>/dev/null")
    report = measured(kata, "--from", kept)
    assert guest_kib(report) > before + 120 * MIB
    assert report["observations"][0]["containers_kib"] > 120 * MIB
    kata.ok("exec", kept, "rm", "/load/x")
    wait_for(lambda: guest_kib(measured(kata, "--from", kept)) < before + 32 * MIB, "the memory is given back")


def test_for_a_runtime_class(kata: Kata) -> None:
    out = kata.ok("overhead", "-m", "48m")
    comments = [line for line in out.splitlines() if line.startswith("#")]
    assert re.fullmatch(r"# MIB +IDLE +FILLING +FULL", comments[0])
    rest = "\n".join(line for line in out.splitlines() if not line.startswith("#"))
    assert re.fullmatch(r'overhead:\n  podFixed:\n    memory: "(\d+)Mi"\n    cpu: "(\d+)m"', rest), out
    own = next(line.split()[-3:] for line in comments if line.startswith("# the containers' own"))
    assert float(own[0]) < 20
    assert float(own[2]) >= 40  # the limit less what is spared
    assert not [row for row in json.loads(kata.ok("list", "--json")) if row["name"].startswith("overhead-")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--from", "nobody-of-this-name"), "nobody-of-this-name"),
        (("-m", "16m"), "cannot measure with a limit of 16m: it needs at least 32 MiB"),
        (("-m", "much"), "much"),
    ],
)
def test_what_cannot_be_measured(kata: Kata, words: tuple[str, ...], message: str) -> None:
    done = kata("overhead", *words)
    assert done.code == 1
    assert done.stderr.startswith("kata-runtime: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
