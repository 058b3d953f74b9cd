"""The jail of User-mode Linux: what root of a guest can reach, what a kernel that was taken over can, how it ends."""

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from netns_helper import ip
from uml_helper import guest_running, kernel_plan, make_initrd, processes_of
from vm_helper import settled

from katapod.observe.confinement import confinement_of
from katapod.plan.call_filter import CallRule
from katapod.plan.jail import Access, Bind, JailPlan
from katapod.vmm.errors import VmmLinkBroken
from katapod.vmm.uml.control import connected_uml
from katapod.vmm.uml.disk_calls import DISK_CALLS
from katapod.vmm.uml.mconsole import Mconsole
from katapod.vmm.uml.plan import MCONSOLE, plan_jail
from katapod.vmm.uml.system_calls import CALLS
from kit.call_recorder import call_names, recording
from kit.jail_probe import answered_calls, in_jail, outcome, raw
from kit.uids import UML_UID as UID
from kit.uml_guest import needs_uml

pytestmark = needs_uml

ROOT = ["disk", "lib", "lib64", "libregset.so.1", "linux", "proc", "sockets", "tmp"]

PANIC = "echo c > /proc/sysrq-trigger"
NULL = Bind(Path("/dev/null"), "/dev/null", Access.DEVICE)


# -- what root of the guest tries


async def test_root_of_a_guest_finds_no_way_to_files_of_the_host(tmp_path: Path) -> None:
    script = """
    try() { if said=$("$@" 2>&1); then echo "DONE $*"; else echo "REFUSED $*: $said"; fi; }
    try mount -t hostfs none /mnt
    try mount -t hostfs none /mnt -o /etc
    grep hostfs /proc/filesystems && echo DONE hostfs
    echo config ubdb=/linux > /proc/mconsole && echo DONE mconsole
    try dd if=/dev/zero of=/dev/ubda bs=512 count=1
    try dd if=/dev/zero of=/dev/ubda bs=512 count=1 oflag=direct
    try blockdev --setrw /dev/ubda
    grep ^host /proc/cpuinfo
    cat /proc/version
    echo THE END
    poweroff -f
    """
    disk = tmp_path / "disk"
    disk.write_bytes(b"of another\n" * 1000)
    before = disk.read_bytes()
    async with guest_running(tmp_path, script, "ubd0r=/given", binds=[Bind(disk, "/given")]) as guest:
        await guest.has_said("THE END")
        assert await guest.wait_end() == 0
        said = guest.said
    refused = "REFUSED mount -t hostfs none /mnt: mount: mounting none on /mnt failed: No such device"
    assert refused in said
    done = [line for line in said.splitlines() if line.startswith("DONE")]
    assert [line for line in done if "blockdev" not in line] == []  # the guest's own flag may be changed
    assert os.uname().nodename not in said.partition("host")[2].split()  # the jail has a name of its own
    assert disk.read_bytes() == before
    assert processes_of(UID) == []


async def test_files_for_a_guest_are_read_only_whatever_it_says(tmp_path: Path) -> None:
    """A disk without `r`: the kernel cannot open it for writing."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    disk.chmod(0o666)
    script = "dd if=/dev/urandom of=/dev/ubda bs=4096 count=4 conv=fsync || echo REFUSED; echo THE END; poweroff -f"
    async with guest_running(tmp_path, script, "ubd0=/given", binds=[Bind(disk, "/given")]) as guest:
        await guest.has_said("THE END")
        assert await guest.wait_end() == 0
        assert "REFUSED" in guest.said
    assert disk.read_bytes() == bytes(1 << 20)


async def test_a_fork_bomb_meets_the_limit_of_its_own_jail(tmp_path: Path) -> None:
    script = """
    (i=0; while [ $i -lt 100 ]; do sleep 1000 & i=$((i + 1)); done) 2>&1  # a shell that cannot fork ends
    killall sleep; sleep 1; (echo still here); poweroff -f
    """
    async with guest_running(tmp_path, script, processes=40) as guest:
        await guest.has_said("still here")
        assert "can't fork" in guest.said
        assert await guest.wait_end() == 0


async def test_memory_that_a_guest_fills_is_its_own(tmp_path: Path) -> None:
    script = "mount -t tmpfs -o size=1g t /mnt; dd if=/dev/zero of=/mnt/big bs=1M; echo AFTER; poweroff -f"
    async with guest_running(tmp_path, script) as guest:
        await guest.wait_end()  # by its own OOM killer, or a panic of its own
        assert "Out of memory" in guest.said or "out of memory" in guest.said or "Killed" in guest.said, guest.said
    assert processes_of(UID) == []


# -- what the host sees of it


async def test_each_process_is_in_the_jail(tmp_path: Path) -> None:
    script = "sleep 1000 & sleep 1000 & sleep 1; echo UP; wait"  # by then nothing comes or goes any more
    async with guest_running(tmp_path, script) as guest:
        await guest.has_said("UP")
        assert await settled(lambda: len(processes_of(UID)) >= 5)  # kernel, helpers, stubs
        pids = processes_of(UID)
        assert guest.child.pid in pids
        inode = os.stat(f"/proc/{guest.child.pid}/ns/mnt").st_ino
        for pid in pids:
            proc = Path(f"/proc/{pid}")
            lines = (proc / "status").read_text().splitlines()
            status = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
            assert status["Uid"] == status["Gid"] == [str(UID)] * 4
            assert status["Groups"] == []
            assert {int(status[name][0], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
            assert (status["NoNewPrivs"], status["Seccomp"]) == (["1"], ["2"])
            said = confinement_of(pid)
            assert said is not None
            assert (said.capabilities, said.no_new_privileges, said.seccomp) == ((), True, True)
            assert {"cgroup", "ipc", "mnt", "net", "pid", "uts"} <= set(said.namespaces)
            assert os.stat(proc / "ns/mnt").st_ino == inode != os.stat("/proc/self/ns/mnt").st_ino
            for kind in ("pid", "ipc", "uts", "net", "cgroup"):
                assert os.readlink(proc / "ns" / kind) != os.readlink(f"/proc/self/ns/{kind}"), kind
            assert sorted(os.listdir(proc / "root")) == ROOT
            opened = [os.readlink(each) for each in (proc / "fd").iterdir()]
            paths = {name for name in opened if name.startswith("/") and not name.startswith("/tmp/")}
            assert paths <= {"/dev/null", "/disk"}, opened
            limits = (proc / "limits").read_text()
            assert "Max core file size        1                    1 " in limits
        mounts = Path(f"/proc/{guest.child.pid}/mountinfo").read_text().splitlines()
        writable = [line.split()[4] for line in mounts if "rw" in line.split()[5].split(",")]
        assert writable == ["/tmp"]


# -- what a kernel that was taken over can do: our own code in place of the program


@pytest.fixture
def jail(tmp_path: Path) -> JailPlan:
    return plan_jail(kernel_plan(tmp_path, make_initrd(tmp_path, "")), UID, None)


def test_calls_that_are_not_listed_are_not_there(jail: JailPlan) -> None:
    made, there = answered_calls(jail, {rule.number for rule in CALLS})
    assert made > 350
    assert there == {}
    for name in ("mount", "ptrace_attach", "unshare", "setns", "bpf", "io_uring_setup", "chroot", "keyctl", "setuid"):
        assert name not in {rule.name for rule in CALLS}


def test_a_kernel_that_was_taken_over_finds_an_empty_host(jail: JailPlan, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of the host")
    secret.chmod(0o666)
    next(bind.source for bind in jail.binds if bind.target == "/disk").chmod(0o666)
    outside = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    outside.bind(f"\0katapod-test-{os.getpid()}")
    us, new_user, attach = os.getpid(), 0x10000000, 16

    def attempts() -> dict[str, Callable[[], Any]]:
        return {
            "a file of the host": lambda: os.open(secret, os.O_RDONLY),
            "a program": lambda: os.execv("/bin/sh", ["sh"]),
            "the disk, to write": lambda: os.open("/disk", os.O_RDWR),
            "a file in its root": lambda: os.open("/new", os.O_WRONLY | os.O_CREAT),
            "a socket of the internet": lambda: socket.socket(socket.AF_INET),
            "a socket of netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
            "an abstract socket of the host": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).connect(
                f"\0katapod-test-{us}"
            ),
            "a process of the host": lambda: os.kill(us, signal.SIGKILL),
            "to trace a process": lambda: raw(101, attach, 2),
            "a user namespace": lambda: raw(56, new_user | 17, 0, 0, 0, 0),
            "more open files": lambda: raw(302, 0, 7, 0, 0),
            "a directory in its tmpfs": lambda: os.mkdir("/tmp/mine"),  # which it may
        }

    said = in_jail(jail, lambda: {name: outcome(action) for name, action in attempts().items()})
    outside.close()
    assert said == {
        "a file of the host": "ENOENT",
        "a program": "ENOENT",
        "the disk, to write": "EROFS",
        "a file in its root": "EROFS",
        "a socket of the internet": "ENOSYS",
        "a socket of netlink": "ENOSYS",
        "an abstract socket of the host": "ECONNREFUSED",
        "a process of the host": "ESRCH",
        "to trace a process": "ENOSYS",
        "a user namespace": "ENOSYS",
        "more open files": "done",  # which asks, and changes nothing
        "a directory in its tmpfs": "done",
    }


def test_a_disk_server_that_was_taken_over_goes_no_further(jail: JailPlan) -> None:
    numbers = dict(DISK_CALLS.refused)
    assert numbers == {name: number for number, name in call_names().items() if name in numbers}

    def probe() -> dict[str, str]:
        tried: dict[str, Callable[[], Any]] = {}
        for name, number in numbers.items():
            tried[name] = functools.partial(raw, number, 0, 0, 0, 0, 0, 0)
        tried["a user namespace"] = functools.partial(raw, 56, 0x10000000 | 17, 0, 0, 0, 0)
        tried["an internet socket"] = lambda: socket.socket(socket.AF_INET)
        tried["a netlink socket"] = lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)
        tried["its death signal"] = functools.partial(raw, 157, 1, 0, 0, 0, 0)
        return {name: outcome(action) for name, action in tried.items()}

    found = in_jail(replace(jail, calls=DISK_CALLS, capabilities=frozenset({1})), probe)
    assert len(found) == len(numbers) + 4
    assert set(found.values()) == {"ENOSYS"}, found


def test_its_directories_and_processes(jail: JailPlan) -> None:
    def probe() -> list[Any]:
        return [sorted(os.listdir("/")), os.listdir("/tmp"), os.getpid(), os.getppid(), os.uname().nodename]

    assert in_jail(jail, probe) == [ROOT, [], 1, 0, "jail"]


# -- the list against what the kernel does


@pytest.fixture
def netns() -> Iterator[Path]:
    name = f"t{os.getpid()}-jail"
    ip("netns", "add", name)
    try:
        ip("tuntap", "add", "tap0", "mode", "tap", "user", str(UID), "vnet_hdr", netns=name)
        ip("addr", "add", "10.99.0.1/24", "dev", "tap0", netns=name)
        ip("link", "set", "tap0", "up", netns=name)
        yield Path("/run/netns") / name
    finally:
        ip("netns", "del", name)


def is_traced(pid: int) -> bool:
    try:
        return "\nTracerPid:\t0\n" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True  # the guest's own come and go


async def test_a_kernel_with_all_kinds_of_devices_calls_what_is_listed(tmp_path: Path, netns: Path) -> None:
    """In a jail without the list but with somebody who looks. If this fails: tools/record_system_calls.py."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(8 << 20))
    subprocess.run(["mke2fs", "-q", "-t", "ext4", disk], check=True)  # noqa: ASYNC221
    os.chown(disk, UID, UID)
    script = f"""
    ifconfig vec0 10.99.0.2 netmask 255.255.255.0 up; ping -c 2 -s 3000 10.99.0.1 && echo PING
    mount -t ext4 /dev/ubda /mnt && dd if=/dev/urandom of=/mnt/f bs=64k count=20 conv=fsync && rm /mnt/f
    sync; fstrim -v /mnt; umount /mnt && echo DISK
    mount -t tmpfs t /mnt; for each in 1 2 3; do (dd if=/dev/urandom bs=1M count=4 | gzip > /mnt/$each) & done; wait
    timeout 1 sleep 5; kill -USR1 $$ & date -s 2030-01-01; rm /mnt/*; umount /mnt
    ifconfig vec0 down; echo WAIT; read line < /dev/zero & until dmesg | grep -q OVER; do sleep 1; done; {PANIC}
    """
    parameters = ("vec0:transport=tap,ifname=tap0,gro=1", "ubd0=/given")
    binds = [Bind(disk, "/given", Access.WRITE)]
    with recording(CALLS) as done:
        async with guest_running(tmp_path, script, *parameters, binds=binds, netns=netns) as guest:
            await guest.has_said("WAIT")
            mconsole = Mconsole(guest.child.pid, MCONSOLE)
            assert "6." in await mconsole.ask("version")
            plugged = ("config ubdb=/given", "config ubdb", "config mem=-8M", "config mem=+8M")
            for command in ("stop", "go", "config mem", "sysrq h", "stack 1", "proc mounts", "log said", *plugged):
                await mconsole.ask(command)
            # what was interrupted goes on by restart_syscall(2); the stop of a process of the guest's, which the kernel
            # traces, would end the kernel
            stopped = [pid for pid in processes_of(UID) if not is_traced(pid)]
            assert guest.child.pid in stopped
            for number in (signal.SIGSTOP, signal.SIGCONT):
                for pid in stopped:
                    os.kill(pid, number)
            for text in ("OVER", "and more"):  # a line is there to be read once the next one begins
                await mconsole.ask(f"log {text}")
            assert await guest.wait_end() == 127
            assert "sysrq: Trigger a crash" in guest.said, "it did not end by itself"
            assert "PING" in guest.said
            assert "DISK" in guest.said
    names = call_names()
    assert {names[number]: sorted(calls)[:5] for number, calls in done.calls.items()} == {}


async def test_what_is_not_listed_would_be_seen(tmp_path: Path) -> None:
    less = tuple(rule for rule in CALLS if rule.name != "fsync")
    only_read = tuple(replace(rule, values=(3,)) if rule.name == "fcntl" else rule for rule in less)
    with recording(only_read) as done:
        async with guest_running(tmp_path, "poweroff -f") as guest:
            assert await guest.wait_end() == 0
    assert set(done.calls) == {72, 74}
    assert {2, 4} <= {arguments[1] for arguments in done.calls[72]}


def test_the_list_has_each_call_once_by_its_right_number() -> None:
    numbers = {name: number for number, name in call_names().items()}
    assert [rule.name for rule in CALLS] == sorted({rule.name for rule in CALLS})
    assert {rule.name: rule.number for rule in CALLS} == {rule.name: numbers[rule.name] for rule in CALLS}
    assert CallRule("clone", 56, 0, (0,), 0x7E020000) in CALLS  # no namespaces


async def test_a_kernel_is_found_and_none_that_has_taken_its_name(tmp_path: Path) -> None:
    async with guest_running(tmp_path, "echo UP; read line < /dev/console") as guest:
        await guest.has_said("UP")
        async with connected_uml(tmp_path, 5.0) as control:
            found, missing = await control.facts(5.0)
        assert found is not None, missing
        assert found.cpus[0].thread == guest.child.pid
        (tmp_path / "sockets").rename(tmp_path / "former")  # the directory of another machine, whose kernel has ended
        (tmp_path / "sockets").mkdir()
        with pytest.raises(VmmLinkBroken, match="it has ended"):
            async with connected_uml(tmp_path, 5.0):
                pass


# -- its end


@pytest.mark.parametrize(
    ("script", "status"),
    [("poweroff -f", 0), ("reboot -f", 0), ("halt -f", 0), (PANIC, 127), ("exit 0", 127), ("kill -SEGV $$", 127)],
)
async def test_it_ends_when_its_guest_does(tmp_path: Path, script: str, status: int) -> None:
    async with guest_running(tmp_path, f"sleep 1000 & echo UP\n{script}\nwhile :; do :; done") as guest:
        if script != "kill -SEGV $$":  # which init ignores, and spins
            assert await guest.wait_end() == status, guest.said
            assert processes_of(UID) == []
    assert processes_of(UID) == []


@pytest.mark.parametrize("how", ["kernel", "stub", "asked", "cancelled"])
async def test_a_guest_that_spins_leaves_nothing(tmp_path: Path, how: str) -> None:
    async with guest_running(tmp_path, "sleep 1000 & echo UP; while :; do :; done", soft=how == "asked") as guest:
        await guest.has_said("UP")
        if how == "kernel":
            os.kill(guest.child.pid, signal.SIGKILL)
            assert await guest.wait_end() == -signal.SIGKILL
            assert processes_of(UID) == []
        elif how == "stub":
            for pid in set(processes_of(UID)) - {guest.child.pid}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await guest.wait_end()
            assert processes_of(UID) == []
    assert processes_of(UID) == []


async def test_it_ends_with_a_killed_supervisor(tmp_path: Path) -> None:
    script = f"""
import asyncio, sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from uml_helper import guest_running
async def main():
    async with guest_running(Path({str(tmp_path)!r}), "echo UP; while :; do :; done") as guest:
        await guest.has_said("UP")
        print("up", flush=True)
        await guest.child.process.wait()
asyncio.run(main())
"""
    supervisor = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)  # noqa: ASYNC220
    assert supervisor.stdout is not None
    try:
        with supervisor.stdout:
            assert supervisor.stdout.readline() == b"up\n"
        assert len(processes_of(UID)) >= 3
    finally:
        supervisor.kill()
        supervisor.wait()
    assert await settled(lambda: processes_of(UID) == [])
