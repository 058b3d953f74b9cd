"""Memory and CPU time of processes: what /proc says, sorted."""

import mmap
import os
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from katapod.host.memory_use import (
    Mapping,
    ProcessMemory,
    cpu_seconds,
    family,
    memory_parts,
    parse_smaps,
    read_process,
)

SMAPS = """\
7f0a7c000000-7f0a80000000 rwxp 00000000 00:00 0 
Size:              65536 kB
Rss:               38912 kB
Pss:               38912 kB
Pss_Dirty:         38912 kB
VmFlags: rd wr ex mr mw me ac sd hg
7f0a80000000-7f0a90000000 rw-s 00000000 00:01 2051                       /memfd:katapod-guest-memory (deleted)
Pss:               36950 kB
55b4abc36000-55b4abd00000 r-xp 00000000 08:01 123                        /opt/a b/qemu-system-x86_64
Pss:                2800 kB
55b4acc36000-55b4ade00000 rw-p 00000000 00:00 0                          [heap]
Pss:                5344 kB
"""  # noqa: W291 - as the kernel writes it


def test_mappings_of_smaps() -> None:
    assert list(parse_smaps(SMAPS)) == [
        Mapping("7f0a7c000000-7f0a80000000", "rwxp", "", 38912),
        Mapping("7f0a80000000-7f0a90000000", "rw-s", "/memfd:katapod-guest-memory (deleted)", 36950),
        Mapping("55b4abc36000-55b4abd00000", "r-xp", "/opt/a b/qemu-system-x86_64", 2800),
        Mapping("55b4acc36000-55b4ade00000", "rw-p", "[heap]", 5344),
    ]


def test_a_process_without_memory() -> None:
    assert list(parse_smaps("")) == []


def test_parts_of_a_sandbox() -> None:
    guest = Mapping("a-b", "rw-s", "/memfd:katapod-guest-memory (deleted)", 1000)
    qemu = ProcessMemory("qemu-system-x86_64", tuple(parse_smaps(SMAPS)), {2051: 80000})
    share = ProcessMemory("virtiofsd", (guest, Mapping("c-d", "rw-p", "[heap]", 300)), {2051: 80000})
    owner = ProcessMemory("python3", (Mapping("e-f", "rw-p", "", 15000),), {})
    found = memory_parts([owner, share, qemu])
    assert found.guest_mapped_kib == 37950
    assert found.guest_unmapped_kib == 80000 - 37950  # one file, however many map it
    assert found.translated_kib == 38912
    assert (found.qemu_heap_kib, found.qemu_program_kib) == (5344, 2800)
    assert (found.virtiofsd_kib, found.owner_kib) == (300, 15000)


def test_two_files_of_guest_memory_add_up() -> None:
    """What is plugged into a clone is a file of its own."""
    qemu = ProcessMemory("qemu-system-x86_64", (), {1: 1000, 2: 500})
    assert memory_parts([qemu]).guest_unmapped_kib == 1500


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sh", "-c", "echo; sleep 1000 & wait"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        for pid in family([process.pid]):
            os.kill(pid, signal.SIGKILL)


def test_a_family(sleeper: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 10
    while len(found := family([sleeper.pid])) < 2 and time.monotonic() < deadline:
        pass
    assert found[0] == sleeper.pid
    assert len(found) == 2
    assert set(found) <= set(family([os.getpid()]))
    assert family([sleeper.pid, sleeper.pid]) == found


def test_of_what_has_ended_there_is_nothing() -> None:
    done = subprocess.Popen(["true"])
    done.wait()
    assert family([done.pid]) == []
    assert read_process(done.pid) is None
    assert cpu_seconds([done.pid]) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="map_files is for root")
def test_memory_that_is_there_and_not_mapped() -> None:
    fd = os.memfd_create("guest")
    try:
        os.truncate(fd, 8 << 20)
        os.pwrite(fd, b"x" * (4 << 20), 0)
        with mmap.mmap(fd, 8 << 20) as memory:
            memory[0:1]
            found = read_process(os.getpid())
            assert found is not None
            assert found.guest_files[os.fstat(fd).st_ino] == 4096
            (mapped,) = [each for each in found.mappings if each.name.startswith("/memfd:guest")]
            assert mapped.pss_kib < 4096
    finally:
        os.close(fd)


def test_cpu_time_of_this_process() -> None:
    assert cpu_seconds([os.getpid()]) == pytest.approx(sum(os.times()[:2]), abs=0.5)
