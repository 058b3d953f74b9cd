"""The jail as a value: what it says of itself, and what it refuses to be."""

from pathlib import Path

import pytest

from katapod.plan.call_filter import CallFilter, CallRule
from katapod.plan.jail import Access, Bind, JailLimits, JailPlan, Tmpfs

BINDS = (
    Bind(Path("/usr/bin/linux.uml"), "/linux", Access.EXECUTE),
    Bind(Path("/run/x/share.sock"), "/sockets/share.sock"),
    Bind(Path("/dev/net/tun"), "/dev/net/tun", Access.DEVICE),
)


def test_all_of_it_is_described() -> None:
    plan = JailPlan(
        5000,
        BINDS,
        (Tmpfs("/tmp", 1 << 20, executable=True),),
        JailLimits(file_bytes=4096),
        CallFilter((CallRule("read", 0), CallRule("socket", 41, 0, (1,)), CallRule("clone", 56, 0, (0,), 0x7C020000))),
        Path("/run/netns/a"),
        fixed_addresses=True,
    )
    assert plan.describe().splitlines() == [
        "user and group 5000, no other groups",
        "no capability; the bounding set is empty",
        "no_new_privs",
        "no random addresses",
        "namespaces of its own: mount, PID, IPC, UTS, cgroup; network /run/netns/a",
        "root: empty, read-only, with",
        "  /linux = /usr/bin/linux.uml (execute)",
        "  /sockets/share.sock = /run/x/share.sock (read)",
        "  /dev/net/tun = /dev/net/tun (device)",
        "  /tmp = tmpfs, 1048576 bytes, 1024 files, exec",
        "limits: 4096 processes, 1024 open files, 0 bytes locked, 4096 bytes a file, no core dump",
        "system calls: clone(argument 0 & 0x7c020000: 0x0), read, socket(argument 0: 0x1)",
    ]


def test_without_a_network_it_has_an_empty_one() -> None:
    lines = JailPlan(5000, ()).describe().splitlines()
    assert "namespaces of its own: mount, PID, IPC, UTS, cgroup; an empty network" in lines
    assert lines[-1] == "system calls: all"


@pytest.mark.parametrize("target", ["linux", "/", "", "/a/../b", "/a//b", "/a/", "/./a", "//a"])
def test_a_target_is_a_plain_absolute_path(target: str) -> None:
    with pytest.raises(ValueError, match="no place in a jail"):
        JailPlan(5000, (Bind(Path("/x"), target),))
    with pytest.raises(ValueError, match="no place in a jail"):
        JailPlan(5000, (), (Tmpfs(target, 1),))


def test_two_things_at_one_place() -> None:
    with pytest.raises(ValueError, match="same place"):
        JailPlan(5000, (Bind(Path("/x"), "/a"),), (Tmpfs("/a", 1),))


def test_root_is_no_user_of_a_jail() -> None:
    with pytest.raises(ValueError, match="other than root"):
        JailPlan(0, ())
