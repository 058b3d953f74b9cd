"""A program in a jail: what it sees of the host, what the host sees of it, and how both end."""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from msgspec.structs import replace
from vm_helper import resources, settled

from katapod.host.jail import Program, running_in_jail
from katapod.host.jail_uids import held_uid
from katapod.host.process import CannotRun, Child
from katapod.model.errors import HostLacks
from katapod.model.uid_range import UidRange
from katapod.plan.call_filter import CallFilter, CallRule
from katapod.plan.jail import Access, Bind, JailLimits, JailPlan, Tmpfs
from kit.uids import JAIL_UID as UID

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

BUSYBOX = Path(shutil.which("busybox") or "/bin/busybox")

NAMES = ("busybox", "cat", "cp", "find", "sh", "sleep", "sort", "true")
NULL = Bind(Path("/dev/null"), "/dev/null", Access.DEVICE)
PROGRAMS = tuple(Bind(BUSYBOX, f"/bin/{name}", Access.EXECUTE) for name in NAMES)
PLAN = JailPlan(UID, (*PROGRAMS, NULL), (Tmpfs("/tmp", 1 << 20),))


def script(text: str) -> Program:
    return Program("/bin/busybox", ("busybox", "sh", "-c", text), {"PATH": "/bin"})


class Words:
    """What a jailed program has said so far."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return self.path.read_text()


@contextlib.asynccontextmanager
async def jailed(
    plan: JailPlan, text: str, tmp_path: Path, *, pass_fds: Sequence[int] = ()
) -> AsyncIterator[tuple[Child, Words]]:
    path = tmp_path / "words"
    with path.open("wb") as output:
        async with running_in_jail(plan, script(text), output=output.fileno(), pass_fds=pass_fds, soft=False) as child:
            yield child, Words(path)


async def said_in_jail(plan: JailPlan, text: str, tmp_path: Path, *, pass_fds: Sequence[int] = ()) -> str:
    async with jailed(plan, text, tmp_path, pass_fds=pass_fds) as (child, words):
        async with asyncio.timeout(180):
            await child.process.wait()
        return str(words)


def pairs(path: str) -> dict[str, list[str]]:
    """Of a file with lines "name: values"."""
    lines = Path(path).read_text().splitlines()
    return {name: values.split() for name, _, values in (line.partition(":") for line in lines)}


async def test_its_root_has_what_was_planned_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("given\n")
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "inner").write_text("inner\n")
    (tmp_path / "writable").mkdir()
    os.chown(tmp_path / "writable", UID, UID)
    for path in (tmp_path / "file", tmp_path / "directory"):
        path.chmod(0o755)
    binds = (
        *PLAN.binds,
        Bind(tmp_path / "file", "/a/b/file"),
        Bind(tmp_path / "directory", "/directory"),
        Bind(tmp_path / "writable", "/writable", Access.WRITE),
    )
    text = """
    find / | sort
    cat /a/b/file /directory/inner
    for each in / /a /directory /tmp /writable /bin; do
        if (echo x > $each/new) 2>/dev/null; then echo writable $each; fi
    done
    echo x > /dev/null && echo device
    (echo x >> /a/b/file) 2>/dev/null || echo read-only
    cp /bin/true /tmp/true && (/tmp/true) 2>/dev/null || echo noexec
    """
    plan = replace(PLAN, binds=binds, tmpfs=(Tmpfs("/tmp", 4 << 20),))
    lines = (await said_in_jail(plan, text, tmp_path)).splitlines()
    given = ["/a/b/file", "/dev/null", "/directory", "/directory/inner", "/tmp", "/writable"]
    assert lines == [
        *sorted(["/", "/a", "/a/b", "/bin", "/dev", *given, *(f"/bin/{name}" for name in NAMES)]),
        *("given", "inner", "writable /tmp", "writable /writable", "device", "read-only", "noexec"),
    ]


async def test_what_the_host_sees_of_it(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    plan = replace(PLAN, limits=JailLimits(open_files=100, processes=7, file_bytes=8192))
    async with jailed(plan, "echo up; sleep 60", tmp_path, pass_fds=[read_end]) as (child, words):
        assert await settled(lambda: str(words) == "up\n")
        proc = f"/proc/{child.pid}"
        status = pairs(f"{proc}/status")
        assert status["Uid"] == status["Gid"] == [str(UID)] * 4
        assert status["Groups"] == []
        for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(status[name][0], 16) == 0, name
        assert status["NoNewPrivs"] == ["1"]
        assert status["NSpid"][-1] == "1"
        for kind in ("mnt", "pid", "ipc", "uts", "net", "cgroup"):
            assert os.readlink(f"{proc}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}"), kind
        assert sorted(os.listdir(f"{proc}/root")) == ["bin", "dev", "tmp"]
        assert sorted(map(int, os.listdir(f"{proc}/fd"))) == sorted({0, 1, 2, read_end})
        assert os.readlink(f"{proc}/fd/0") == "/dev/null"
        limits = Path(f"{proc}/limits").read_text()
        for name, value in (("core file size", 1), ("open files", 100), ("processes", 7), ("file size", 8192)):
            assert re.search(rf"^Max {name} +{value} +{value} ", limits, re.MULTILINE), limits
        names = {line.partition(b"=")[0] for line in Path(f"{proc}/environ").read_bytes().split(b"\0") if line}
        assert names <= {b"PATH", b"SHLVL", b"PWD"}  # those of the shell
    os.close(read_end)
    os.close(write_end)


async def test_only_listed_calls_are_there(tmp_path: Path) -> None:
    numbers = {"write": 1, "mprotect": 10, "brk": 12, "getuid": 102, "execve": 59, "exit_group": 231, "arch_prctl": 158,
               "set_tid_address": 218, "prctl": 157, "rt_sigaction": 13, "mmap": 9, "munmap": 11, "fcntl": 72,
               "geteuid": 107, "getpid": 39, "getppid": 110, "stat": 4, "getcwd": 79, "uname": 63}  # fmt: skip
    calls = CallFilter(tuple(CallRule(name, number) for name, number in numbers.items()))
    text = "echo one; (echo two); echo three"  # the parentheses want fork(2)
    said = await said_in_jail(replace(PLAN, calls=calls), text, tmp_path)
    assert said.startswith("one\n")
    assert "two" not in said
    assert "Function not implemented" in said


async def test_what_it_started_ends_with_it(tmp_path: Path) -> None:
    text = "(busybox setsid sleep 1000 &) ; (trap '' TERM HUP; sleep 1000) & echo up; wait"
    async with jailed(PLAN, text, tmp_path) as (child, words):
        assert await settled(lambda: len(processes_of(UID)) >= 3), (str(words), processes_of(UID))
        os.kill(child.pid, signal.SIGKILL)
        assert await child.process.wait() == -signal.SIGKILL
        assert child.describe_end() == "killed by SIGKILL"
        assert processes_of(UID) == []  # the end of process 1 is told when the last of the others is gone


def processes_of(uid: int) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if entry.isdigit() and os.stat(f"/proc/{entry}").st_uid == uid:
                found.append(int(entry))
    return found


async def test_it_ends_with_us(tmp_path: Path) -> None:
    script = f"""
import asyncio, sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from test_jail import PLAN, jailed
async def main():
    async with jailed(PLAN, "sleep 1000 & sleep 1000", Path({str(tmp_path)!r})) as (child, words):
        print(child.pid, flush=True)
        await child.process.wait()
asyncio.run(main())
"""
    supervisor = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", script], stdout=subprocess.PIPE
    )
    assert supervisor.stdout is not None
    with supervisor.stdout:
        pid = int(supervisor.stdout.readline())
        assert pid in processes_of(UID)
        supervisor.kill()
        supervisor.wait()
    assert await settled(lambda: processes_of(UID) == [])


async def test_a_user_id_that_is_still_in_use_is_not_given_out(tmp_path: Path) -> None:
    uids = UidRange(UID, UID)
    async with jailed(PLAN, "echo up; sleep 1000", tmp_path) as (_, words):
        assert await settled(lambda: str(words) == "up\n")
        with pytest.raises(HostLacks, match="are in use"), held_uid(uids, tmp_path / "uids"):
            pass
    with held_uid(uids, tmp_path / "uids") as uid:
        assert uid == UID


async def test_a_process_limit_holds_the_jail_alone(tmp_path: Path) -> None:
    plan = replace(PLAN, limits=JailLimits(processes=3))
    said = await said_in_jail(plan, "sleep 9 & sleep 9 & sleep 9 & sleep 9 & echo here", tmp_path)
    assert "can't fork: Resource temporarily unavailable" in said


async def test_what_cannot_be_made_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    before = resources()
    missing = replace(PLAN, binds=(*PLAN.binds, Bind(tmp_path / "none", "/none")))
    with pytest.raises(HostLacks, match=f"cannot make its root directory: No such file or directory: {tmp_path}/none"):
        await said_in_jail(missing, "true", tmp_path)
    with pytest.raises(CannotRun, match=r"cannot run /bin/busybox in its jail: No such file"):
        await said_in_jail(replace(PLAN, binds=()), "true", tmp_path)
    with pytest.raises(CannotRun, match=r"network namespace .*/none"):
        await said_in_jail(replace(PLAN, netns=tmp_path / "none"), "true", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(HostLacks, match="cannot enter its network namespace: Invalid argument"):
        await said_in_jail(replace(PLAN, netns=tmp_path / "file"), "true", tmp_path)
    await asyncio.sleep(0)
    assert resources() == before
    assert os.readlink("/proc/self/ns/pid") == os.readlink("/proc/self/ns/pid_for_children")


async def test_many_at_once() -> None:
    ends = await asyncio.gather(*(ends_with(number) for number in range(20)))
    assert ends == list(range(20))


async def ends_with(number: int) -> int:
    plan = replace(PLAN, uid=UID + number)
    async with running_in_jail(plan, script(f"exit {number}"), output=2) as child:
        return await child.process.wait()
