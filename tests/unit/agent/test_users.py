"""Users as `docker run -u` resolves them, and what can be executed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from katapod.agent.rootfs import Root, describe_format, find_command
from katapod.agent.users import UnknownUser, find_home, resolve_user

PASSWD = "root:x:0:0:root:/root:/bin/sh\n# no entry\nann:x:1000:1001::/home/ann:/bin/sh\nbad:x:x:1::/:\n"
PASSWD += "four:x:7:8\nthree:x:9\ntwo:x\n  spaced:x:11:11::/home/s \r\n\nodd\x0cname:x:12:12::/home/o:\n"
GROUP = "root:x:0:\nann:x:1001:\nwheel:x:10:bob,ann\nvideo:x:44:ann\nother:x:50:annie\nshort:x:60\n"


@pytest.mark.parametrize(
    ("user", "group", "more", "expected"),
    [
        ("ann", "", (), (1000, 1001, [1001, 10, 44], "/home/ann")),
        ("1000", "", (), (1000, 1001, [1001, 10, 44], "/home/ann")),
        ("4242", "", (), (4242, 0, [0], "/")),
        ("ann", "video", (), (1000, 44, [44], "/home/ann")),
        ("ann", "7", (), (1000, 7, [7], "/home/ann")),
        ("root", "", ("wheel", "99", "wheel"), (0, 0, [0, 10, 99], "/root")),
        ("ann", "", ("ann", "other"), (1000, 1001, [1001, 10, 44, 50], "/home/ann")),
        ("four", "", (), (7, 8, [8], "/")),
        ("three", "", (), (9, 0, [0], "/")),
        ("spaced", "short", (), (11, 60, [60], "/home/s")),
        ("odd\x0cname", "", (), (12, 12, [12], "/home/o")),
    ],
)
def test_resolve(user: str, group: str, more: tuple[str, ...], expected: tuple[int, int, list[int], str]) -> None:
    found = resolve_user(user, group, more, PASSWD, GROUP)
    assert (found.uid, found.gid, found.groups, found.home) == expected


@pytest.mark.parametrize(
    ("user", "group", "message"),
    [
        ("ghost", "", "no user ghost in the image's /etc/passwd"),
        ("bad", "", "no user bad in the image's /etc/passwd"),
        ("99999999999", "", "no user 99999999999"),
        ("-1", "", "no user -1"),
        ("two", "", "no user two"),
        ("ann", "ghosts", "no group ghosts in the image's /etc/group"),
    ],
)
def test_unknown(user: str, group: str, message: str) -> None:
    with pytest.raises(UnknownUser, match=message):
        resolve_user(user, group, (), PASSWD, GROUP)


def test_home() -> None:
    assert find_home(1000, PASSWD) == "/home/ann"
    assert find_home(5, PASSWD) == "/"


def test_links_do_not_lead_out_of_the_root(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("host")
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc/passwd").symlink_to("../../secret")
    (root / "etc/group").symlink_to("/etc/real")
    (root / "etc/real").write_text("inside")
    opened = Root(str(root))
    try:
        assert opened.read("/etc/passwd") is None
        assert opened.read_text("/etc/group") == "inside"
        assert opened.read("/../secret") is None
    finally:
        opened.close()


def test_only_regular_files_are_read_and_not_without_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "big").write_bytes(b"x" * 5000)
    opened = Root(str(tmp_path))
    try:
        assert opened.read("fifo") is None  # and does not hang
        assert opened.read(".") is None
        assert opened.read("big", 100) == b"x" * 100
        assert opened.lacks_directory("nowhere")
        assert not opened.lacks_directory("big")
    finally:
        opened.close()


def test_program_is_found_through_path_and_cwd(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/tool").write_text("#!/bin/sh\n")
    opened = Root(str(tmp_path))
    try:
        assert opened.program_head("tool", "/usr/bin:/bin", "/") is None  # nobody may execute it
        (tmp_path / "bin/tool").chmod(0o755)
        assert opened.program_head("tool", "/usr/bin:/bin", "/") == b"#!/bin/sh\n"
        assert opened.program_head("./tool", "", "/bin") == b"#!/bin/sh\n"
        assert opened.program_head("nothing", "/bin", "/") is None
    finally:
        opened.close()


def elf(machine: int, order: int = 1) -> bytes:
    return b"\x7fELF\x02" + bytes([order]) + b"\0" * 12 + machine.to_bytes(2, "little" if order == 1 else "big")


@pytest.mark.parametrize(
    ("head", "cause"),
    [
        (b"#!/bin/sh", ""),
        (elf(62), ""),
        (elf(3), ""),
        (elf(183), "it is a program for aarch64, and this machine is x86_64"),
        (elf(22, order=2), "it is a program for s390, and this machine is x86_64"),
        (b"echo hello", "it is neither a program nor a script that begins with #!"),
        (b"", "it is neither a program nor a script that begins with #!"),
        (b"\x7fELFjunk", "it is neither a program nor a script that begins with #!"),
    ],
)
def test_format(head: bytes, cause: str) -> None:
    assert describe_format(head, "x86_64") == cause


@pytest.mark.parametrize(
    ("error", "found"), [(errno.ENOENT, "not in PATH"), (errno.ENOTDIR, "not in PATH"), (errno.ENOMEM, "found")]
)
def test_a_guest_that_is_short_of_something_lacks_no_command(
    error: int, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stat(name: str) -> os.stat_result:
        raise OSError(error, os.strerror(error), name)

    monkeypatch.chdir(tmp_path)
    for name in ("setgroups", "setgid", "setuid"):
        monkeypatch.setattr(os, name, lambda given: None)
    monkeypatch.setattr("katapod.agent.rootfs.os.stat", stat)
    assert find_command("sh", "/bin", str(tmp_path), 0, 0, []) == found
