"""What a program in a jail can do: our own code in place of it, and what the host says of one that runs."""

import contextlib
import ctypes
import errno
import functools
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from katapod.host.jail import _next_child_is_process_1
from katapod.host.jail_entry import Entry, enter_jail
from katapod.plan.call_filter import assemble
from katapod.plan.jail import JailPlan
from kit.call_recorder import call_names

__all__ = ["answered_calls", "assert_jailed", "in_jail", "outcome", "raw", "script_for_jail", "status_of"]

_NO_CAPABILITY = {"CapInh": 0, "CapPrm": 0, "CapEff": 0, "CapBnd": 0, "CapAmb": 0}

_libc = ctypes.CDLL(None, use_errno=True)


def in_jail(plan: JailPlan, probe: Callable[[], Any]) -> Any:
    """What `probe` returns that runs as process 1 of the jail, in place of the program."""
    read_end, write_end = os.pipe()
    report, reported = os.pipe()
    parent = os.pidfd_open(os.getpid())
    assert plan.calls is not None
    entry = Entry(plan, assemble(plan.calls), None, (write_end,), parent, reported)

    def before_exec() -> None:
        enter_jail(entry)
        try:
            os.write(write_end, json.dumps(probe()).encode())
        except BaseException as exc:
            os.write(write_end, json.dumps(f"the probe failed: {exc!r}").encode())
        os._exit(0)

    with contextlib.suppress(subprocess.SubprocessError), _next_child_is_process_1():
        subprocess.run(["none"], preexec_fn=before_exec, close_fds=False, start_new_session=True, check=False)
    for fd in (write_end, reported, parent):
        os.close(fd)
    with os.fdopen(report, "rb") as failed, os.fdopen(read_end, "rb") as said:
        assert failed.read() == b""
        return json.loads(said.read())


def outcome(action: Callable[[], Any]) -> str:
    try:
        action()
    except OSError as exc:
        return errno.errorcode.get(exc.errno or 0, str(exc.errno))
    return "done"


def raw(number: int, *arguments: int) -> None:
    """A system call. Raises OSError."""
    ctypes.set_errno(0)
    if _libc.syscall(ctypes.c_long(number), *(ctypes.c_long(each) for each in arguments)) < 0:
        raise OSError(ctypes.get_errno(), "")


def answered_calls(plan: JailPlan, listed: Collection[int]) -> tuple[int, dict[str, str]]:
    """Make all system calls but those `listed`, in the jail, with zeroes: how many that were, and what those did that
    were there."""

    def probe() -> dict[int, str]:
        found = {}
        for number in (*range(335), *range(337, 470)):  # the kernel serves uprobes by two calls that no filter sees
            if number not in listed:
                found[number] = outcome(functools.partial(raw, number, 0, 0, 0, 0, 0, 0))
        return found

    found, names = in_jail(plan, probe), call_names()
    return len(found), {names.get(int(number), number): said for number, said in found.items() if said != "ENOSYS"}


def status_of(pid: int) -> dict[str, list[str]]:
    """/proc/PID/status by its names."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: values.split() for name, _, values in (line.partition(":") for line in lines)}


def assert_jailed(pid: int, *, own_network: bool = True) -> None:
    """Of a VMM that runs. `own_network`: its network namespace is not ours."""
    status = status_of(pid)
    uid = int(status["Uid"][0])
    assert 0x70000000 <= uid <= 0x7000FFFF
    assert status["Uid"] == status["Gid"] == [str(uid)] * 4
    assert status["Groups"] == []
    assert {name: int(status[name][0], 16) for name in _NO_CAPABILITY} == _NO_CAPABILITY
    assert (status["NoNewPrivs"], status["Seccomp"]) == (["1"], ["2"])
    assert status["NSpid"][-1] == "1"
    for kind in ("mnt", "pid", "ipc", "uts", "cgroup", *(["net"] if own_network else [])):
        assert os.readlink(f"/proc/{pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}"), kind
    root = set(os.listdir(f"/proc/{pid}/root"))
    assert {"dev", "lib", "lib64"} <= root, root
    if "linux" in root:  # User-mode Linux
        assert root == {"dev", "disk", "lib", "lib64", "libregset.so.1", "linux", "proc", "sockets", "tmp"}
        assert os.listdir(f"/proc/{pid}/root/proc") == ["cpuinfo"]
    else:
        assert not {"bin", "boot", "home", "opt", "proc", "root", "sbin", "sys"} & root, root
        assert "usr" in root
        assert sorted(os.listdir(f"/proc/{pid}/root/etc")) == ["ld.so.cache"]
    mounts = [line.split() for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
    writable = {mount[4] for mount in mounts if "rw" in mount[5].split(",")}
    assert len(writable) == 1, writable  # a directory of its own, in memory
    assert all(mount[mount.index("-") + 1] == "tmpfs" for mount in mounts if mount[4] in writable)
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert "Max core file size        1                    1 " in limits


def script_for_jail(directory: Path, text: str) -> Path:
    """A program that runs a shell script in the jail of a QEMU: its interpreter lies where that QEMU's libraries would
    be."""
    for name in ("bin", "lib"):
        (directory / name).mkdir(parents=True)
        (directory / name).chmod(0o755)
    shell = directory / "lib" / "busybox"
    shutil.copy(shutil.which("busybox") or "/bin/busybox", shell)
    program = directory / "bin" / "qemu"
    program.write_text(f"#!{shell} sh\n{text}\n")
    program.chmod(0o755)
    return program
