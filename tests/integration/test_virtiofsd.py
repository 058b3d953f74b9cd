"""A real virtiofsd: its start, its end, and its log, which a guest could fill."""

import asyncio
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from vm_helper import DIALECT, VIRTIOFSD, needs_vm, resources, settled

from katapod.host.facts import virtiofsd_dialect
from katapod.host.virtiofsd import LOG_BYTES, VirtiofsdFailed, VirtiofsdProcess, running_virtiofsd
from katapod.model.errors import MissingProgram
from katapod.plan.virtiofsd import VirtiofsdPlan

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


async def test_the_dialect_of_the_installed_one() -> None:
    assert await virtiofsd_dialect(VIRTIOFSD) is DIALECT


async def test_serves_and_leaves_nothing(share: Path, tmp_path: Path) -> None:
    before = resources()
    async with running_virtiofsd(plan(share), tmp_path / "v" / "fs.sock", tmp_path / "log") as daemon:
        with connect(tmp_path / "v" / "fs.sock"):
            await asyncio.sleep(0.2)
            assert daemon.child.process.returncode is None
        async with asyncio.timeout(5):
            await daemon.wait_end()  # its only client has gone
    assert await settled(lambda: pids_of(share) == [])
    await asyncio.sleep(0)
    assert resources() == before


async def test_it_is_ended_when_nobody_ever_connected(share: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    async with running_virtiofsd(plan(share), tmp_path / "fs.sock", tmp_path / "log"):
        pass
    assert time.monotonic() - started < 20
    assert await settled(lambda: pids_of(share) == [])


async def test_a_killed_one_takes_its_helpers_along_and_is_told_as_that(share: Path, tmp_path: Path) -> None:
    async with running_virtiofsd(plan(share), tmp_path / "fs.sock", tmp_path / "log") as daemon:
        with connect(tmp_path / "fs.sock"):
            await asyncio.sleep(0.2)
            os.kill(daemon.child.pid, signal.SIGKILL)
            async with asyncio.timeout(5):
                assert await daemon.wait_end() == "killed by SIGKILL"
            assert "virtiofsd ended unexpectedly: killed by SIGKILL" in str(daemon.explain_end())
            assert await settled(lambda: pids_of(share) == [])


async def end_of(program: str, share: Path, tmp_path: Path) -> VirtiofsdProcess:
    async with running_virtiofsd(plan(share, program), tmp_path / "fs.sock", tmp_path / "log") as daemon:
        async with asyncio.timeout(20):
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
