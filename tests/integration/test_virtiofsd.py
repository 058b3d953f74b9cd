"""A real virtiofsd: its start, its end, and its log, which a guest could fill."""

import asyncio
import errno
import json
import os
import re
import resource
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from vm_helper import DIALECT, VIRTIOFSD, needs_vm, resources, settled

from katapod.host.facts import virtiofsd_implementation
from katapod.host.virtiofsd import LOG_BYTES, VirtiofsdFailed, VirtiofsdProcess, running_virtiofsd
from katapod.model.errors import MissingProgram
from katapod.plan.virtiofsd import VirtiofsdPlan
from katapod.plan.virtiofsd_calls import VIRTIOFSD_CALLS
from kit.jail_probe import status_of

pytestmark = needs_vm


@pytest.fixture
def share(tmp_path: Path) -> Path:
    directory = tmp_path / "shared, with = odd \\ name"
    directory.mkdir()
    return directory


def plan(share: Path, program: str = VIRTIOFSD) -> VirtiofsdPlan:
    return VirtiofsdPlan(program, DIALECT, share, "auto")


def connect(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.connect(str(path))
    return client


async def wait_for_words(log: Path, words: str) -> None:
    assert await settled(lambda: words in log.read_text(errors="replace")), log.read_text(errors="replace")


def pids_of(share: Path) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                command = Path(f"/proc/{entry}/cmdline").read_bytes()
            except OSError:
                continue
            if os.fsencode(share.parent) in command:
                found.append(int(entry))
    return found


async def test_the_implementation_of_the_installed_one() -> None:
    assert await virtiofsd_implementation(VIRTIOFSD) is DIALECT


async def test_it_may_have_more_files_open_than_its_supervisor(share: Path, tmp_path: Path) -> None:
    """It has one open for each file that its guest knows, and 1024 are usual for a shell."""
    own = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, own[1]), own[1]))
    try:
        async with running_virtiofsd(plan(share), tmp_path / "v" / "fs.sock", tmp_path / "log") as daemon:
            soft, hard = resource.prlimit(daemon.child.pid, resource.RLIMIT_NOFILE)
            assert soft == hard >= own[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, own)


async def test_serves_and_leaves_nothing(share: Path, tmp_path: Path) -> None:
    before = resources()
    async with running_virtiofsd(plan(share), tmp_path / "v" / "fs.sock", tmp_path / "log") as daemon:
        with connect(tmp_path / "v" / "fs.sock"):
            await asyncio.sleep(0.2)
            assert daemon.child.process.returncode is None
            limits = Path(f"/proc/{daemon.child.pid}/limits").read_text()
            assert re.search(r"^Max core file size +1 +1 ", limits, re.MULTILINE), limits
        async with asyncio.timeout(180):
            await daemon.wait_end()  # its only client has gone
    assert await settled(lambda: pids_of(share) == [])
    await asyncio.sleep(0)
    assert resources() == before


async def test_it_is_ended_when_nobody_ever_connected(share: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    async with running_virtiofsd(plan(share), tmp_path / "fs.sock", tmp_path / "log"):
        pass
    assert time.monotonic() - started < 180
    assert await settled(lambda: pids_of(share) == [])


async def test_a_killed_one_takes_its_helpers_along_and_is_told_as_that(share: Path, tmp_path: Path) -> None:
    async with running_virtiofsd(plan(share), tmp_path / "fs.sock", tmp_path / "log") as daemon:
        with connect(tmp_path / "fs.sock"):
            await asyncio.sleep(0.2)
            os.kill(daemon.child.pid, signal.SIGKILL)
            async with asyncio.timeout(180):
                assert await daemon.wait_end() == "killed by SIGKILL"
            assert "virtiofsd ended unexpectedly: killed by SIGKILL" in str(daemon.explain_end())
            assert await settled(lambda: pids_of(share) == [])


async def end_of(program: str, share: Path, tmp_path: Path) -> VirtiofsdProcess:
    async with running_virtiofsd(plan(share, program), tmp_path / "fs.sock", tmp_path / "log") as daemon:
        async with asyncio.timeout(180):
            await daemon.wait_end()
        await asyncio.sleep(0.1)
        return daemon


async def test_a_program_that_fails_at_once(share: Path, tmp_path: Path) -> None:
    daemon = await end_of("/bin/false", share, tmp_path)
    assert str(daemon.explain_end()) == "virtiofsd ended unexpectedly: exit status 1"


async def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    daemon = await end_of(VIRTIOFSD, tmp_path / "none", tmp_path)
    assert "virtiofsd ended unexpectedly: exit status 1; it said: " in str(daemon.explain_end())


async def test_no_virtiofsd(share: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingProgram, match="cannot run /none/virtiofsd"):
        async with running_virtiofsd(plan(share, "/none/virtiofsd"), tmp_path / "fs.sock", tmp_path / "log"):
            pytest.fail("it started")


async def test_a_path_too_long_for_a_socket(share: Path, tmp_path: Path) -> None:
    before = resources()
    with pytest.raises(VirtiofsdFailed, match=r"cannot listen on .*: AF_UNIX path too long"):
        async with running_virtiofsd(plan(share), tmp_path / ("x" * 120) / "fs.sock", tmp_path / "log"):
            pytest.fail("it started")
    await asyncio.sleep(0)
    assert resources() == before


async def test_its_words_are_kept_within_their_limit(share: Path, tmp_path: Path) -> None:
    """/run is memory: a guest that provokes warnings without end must not fill it."""
    flood = tmp_path / "flood"
    flood.write_text("#!/bin/sh\nhead -c 5000000 /dev/zero | tr '\\0' 'x'\necho the end >&2\nexit 4\n")
    flood.chmod(0o755)
    daemon = await end_of(str(flood), share, tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.glob("log*")) <= LOG_BYTES
    assert "exit status 4" in str(daemon.explain_end())
    assert "the end" in str(daemon.explain_end())


@pytest.mark.parametrize("delay_s", [0.0, 0.005, 0.02, 0.1])
async def test_a_cancelled_start_leaves_nothing(share: Path, tmp_path: Path, delay_s: float) -> None:
    async def start() -> None:
        async with running_virtiofsd(plan(share), tmp_path / "fs.sock", tmp_path / "log"):
            await asyncio.sleep(60)

    before = resources()
    task = asyncio.create_task(start())
    await asyncio.sleep(delay_s)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await settled(lambda: pids_of(share) == [])
    await asyncio.sleep(0)
    assert resources() == before


async def test_what_the_host_sees_of_it(share: Path, tmp_path: Path) -> None:
    """Of the process that a guest speaks to: it is the last that is started."""
    path = tmp_path / "fs.sock"
    async with running_virtiofsd(plan(share), path, tmp_path / "log"):
        with connect(path):

            def serving() -> list[int]:
                """Those with its own list of system calls beside ours."""
                return [pid for pid in pids_of(share) if status_of(pid)["Seccomp_filters"] == ["2"]]

            assert await settled(lambda: serving() != [])
            for pid in serving():
                status = status_of(pid)
                assert status["NoNewPrivs"] == ["1"]
                allowed = sum(1 << number for number in (0, 1, 3, 4, 6, 7, 27, 31))  # of files' owners and modes, mknod
                assert int(status["CapPrm"][0], 16) & ~allowed == 0
                for kind in ("mnt", "pid", "net", "ipc", "uts", "cgroup"):
                    assert os.readlink(f"/proc/{pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}"), kind
                assert os.listdir(f"/proc/{pid}/root") == []  # the share
                limits = Path(f"/proc/{pid}/limits").read_text()
                assert re.search(r"^Max core file size +1 +1 ", limits, re.MULTILINE)
                assert re.search(r"^Max open files +(\d+) +\1 ", limits, re.MULTILINE)


PROBE = """#!{python}
import ctypes, errno, json, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def error(number, *arguments):
    ctypes.set_errno(0)
    libc.syscall(ctypes.c_long(number), *(ctypes.c_long(each) for each in arguments))
    return ctypes.get_errno()
calls = json.load(open({calls!r}))
print(json.dumps([error(*call) for call in calls]), flush=True)
"""


async def test_what_no_virtiofsd_needs_is_refused(share: Path, tmp_path: Path) -> None:
    """Whatever its own sandbox would let pass: a program in its place tries each."""
    bad = -1  # makes a call that gets as far as the kernel fail, in another way
    namespaces = [[272, each] for each in (0x10000000, 0x02000000, 0x04000000, 0x08000000)]
    refused = [*namespaces, [435, 0, 0], *([number, *[bad] * 5] for _, number in VIRTIOFSD_CALLS.refused)]
    sockets = [[41, family, 1, 0] for family in (2, 10, 16, 17, 40)]
    allowed = [[272, 0x00000200], [41, 1, 1, 0], [165, 0, 0, 0, 0, 0], [161, 0]]  # CLONE_FS, AF_UNIX, mount, chroot
    calls = tmp_path / "calls"
    calls.write_text(json.dumps([*refused, *sockets, *allowed]))
    program = tmp_path / "virtiofsd"
    program.write_text(PROBE.format(python=sys.executable, calls=str(calls)))
    program.chmod(0o755)
    async with running_virtiofsd(plan(share, str(program)), tmp_path / "fs.sock", tmp_path / "log") as daemon:
        async with asyncio.timeout(180):
            assert await daemon.wait_end() == "exit status 0", (tmp_path / "log").read_text()
        await wait_for_words(tmp_path / "log", "]")
    found = json.loads((tmp_path / "log").read_text())
    count = len(refused) + len(sockets)
    assert set(found[:count]) == {errno.ENOSYS}
    assert errno.ENOSYS not in found[count:]
