"""Memory and CPU time of processes: what /proc says, sorted."""

import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from katapod.observe.memory_use import (
    Mapping,
    ProcessMemory,
    cpu_seconds,
    family,
    is_disk_server,
    memory_parts,
    parse_smaps,
    read_process,
    read_processes,
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
        Mapping("7f0a7c000000-7f0a80000000", "rwxp", "", 38912, ("00:00", 0)),
        Mapping("7f0a80000000-7f0a90000000", "rw-s", "/memfd:katapod-guest-memory (deleted)", 36950, ("00:01", 2051)),
        Mapping("55b4abc36000-55b4abd00000", "r-xp", "/opt/a b/qemu-system-x86_64", 2800, ("08:01", 123)),
        Mapping("55b4acc36000-55b4ade00000", "rw-p", "[heap]", 5344, ("00:00", 0)),
    ]


def test_a_process_without_memory() -> None:
    assert list(parse_smaps("")) == []


def test_parts_of_a_sandbox() -> None:
    guest = Mapping("a-b", "rw-s", "/memfd:katapod-guest-memory (deleted)", 1000)
    qemu = ProcessMemory("qemu-system-x86_64", tuple(parse_smaps(SMAPS)), {2051: 80000}, of_vmm=True)
    share = ProcessMemory("virtiofsd", (guest, Mapping("c-d", "rw-p", "[heap]", 300)), {2051: 80000})
    supervisor = ProcessMemory("python3", (Mapping("e-f", "rw-p", "", 15000),), {})
    found = memory_parts([supervisor, share, qemu], emulated=True)
    assert found.guest_mapped_kib == 37950
    assert found.guest_unmapped_kib == 80000 - 37950  # one file, however many map it
    assert found.translated_kib == 38912
    assert (found.vmm_heap_kib, found.vmm_program_kib) == (5344, 2800)
    assert (found.virtiofsd_kib, found.supervisor_kib) == (300, 15000)


UML_KERNEL = """\
60001000-606a6000 r-xp 00001000 fe:00 5827106                            /linux
Pss:                4756 kB
606a6000-608b9000 rwxp 006a6000 fe:00 5827106                            /linux
Pss:                1740 kB
60a3b000-60a87000 rw-p 00000000 00:00 0 
Pss:                 172 kB
99400000-b0436000 rwxs 39400000 00:3d 3                                  /tmp/#3 (deleted)
Pss:               40955 kB
7fe611666000-7fe6117bc000 r-xp 00026000 fe:00 339380                     /lib/x86_64-linux-gnu/libc.so.6
Pss:                  12 kB
"""  # noqa: W291 - as the kernel writes it
UML_STUB = """\
00400000-00404000 r-xs 4ed03000 00:3d 3                                  /tmp/#3 (deleted)
Pss:                   8 kB
00946000-00947000 rwxs 39c02000 00:3d 3                                  /tmp/#3 (deleted)
Pss:                   2 kB
7f0000000000-7f0000001000 r-xp 00001000 fe:00 5827106                    /linux
Pss:                   1 kB
"""


def test_parts_of_user_mode_linux() -> None:
    """Its memory is a file in its jail, mapped by its stubs too, and it writes to its own program; nothing is
    translated. As recorded of Linux 6.1.176."""
    kernel = ProcessMemory("linux.uml", tuple(parse_smaps(UML_KERNEL)), {3: 53728}, of_vmm=True)
    stub = ProcessMemory("linux.uml", tuple(parse_smaps(UML_STUB)), {3: 53728}, of_vmm=True)
    heap = Mapping("a-b", "rw-p", "[heap]", 700)
    disks = ProcessMemory("qemu-storage-daemon", (heap,), {3: 53728})
    found = memory_parts([kernel, stub, disks], emulated=False)
    assert (found.guest_mapped_kib, found.guest_unmapped_kib) == (40965, 53728 - 40965)
    assert (found.vmm_program_kib, found.vmm_heap_kib, found.translated_kib) == (4756 + 1740 + 12 + 1, 172, 0)
    assert (found.disk_server_kib, found.virtiofsd_kib, found.supervisor_kib) == (700, 0, 0)
    assert found.host_kib == found.total_kib - 53728


@pytest.mark.parametrize("argv0", ["qemu-storage-daemon /run/vc/vm/a", "/usr/bin/qemu-storage-daemon"])
def test_who_serves_disks_is_known_by_its_command_line(argv0: str) -> None:
    words = [argv0, "-c", "echo; read line"]
    with subprocess.Popen(words, executable="/bin/sh", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # a process that has just executed a program shows no command line yet
        try:
            found = read_process(process.pid)
            assert found is not None
            assert found.is_disk_server
            assert is_disk_server(process.pid)
            assert not is_disk_server(os.getpid())
        finally:
            process.kill()


def test_a_file_of_the_supervisor_is_not_the_guests() -> None:
    private = Mapping("a-b", "rw-p", "/tmp/cache (deleted)", 100)
    assert memory_parts([ProcessMemory("python3", (private,), {})], emulated=False).supervisor_kib == 100


SHARING = """
import ctypes, os, signal
libc = ctypes.CDLL(None)
stack = ctypes.create_string_buffer(65536)
wait = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(("pause", libc))
CLONE_VM = 0x100
pid = libc.clone(wait, ctypes.c_void_p(ctypes.addressof(stack) + 65536), CLONE_VM | signal.SIGCHLD, None)
copy = os.fork()
if not copy:
    signal.pause()
print(pid, copy, flush=True)
signal.pause()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="kcmp and map_files are for root")
def test_an_address_space_counts_once() -> None:
    """A helper of a User-mode Linux kernel shares all of its memory, and smaps tells it of both; a copy counts."""
    with subprocess.Popen([sys.executable, "-c", SHARING], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        helper, copy = map(int, process.stdout.readline().split())
        try:
            pids = [process.pid, helper, copy]
            assert sorted(family([process.pid])) == sorted(pids)
            found = read_processes(pids, process.pid)
            assert [each.of_vmm for each in found] == [True, True]
            assert len(read_processes(pids, 0)) == 3
        finally:
            for pid in (copy, helper, process.pid):
                os.kill(pid, signal.SIGKILL)


def test_two_files_of_guest_memory_add_up() -> None:
    """What is plugged into a clone is a file of its own."""
    qemu = ProcessMemory("qemu-system-x86_64", (), {1: 1000, 2: 500})
    assert memory_parts([qemu], emulated=False).guest_unmapped_kib == 1500


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sh", "-c", "echo; sleep 1000 & wait"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        for pid in family([process.pid]):
            os.kill(pid, signal.SIGKILL)


def test_a_family(sleeper: subprocess.Popen[bytes]) -> None:
    while len(found := family([sleeper.pid])) < 2:
        time.sleep(0.001)
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
    before = sum(os.times()[:2])
    found = cpu_seconds([os.getpid()])
    assert before - 0.02 <= found <= sum(os.times()[:2]) + 0.02  # whole ticks, of user and system apart
