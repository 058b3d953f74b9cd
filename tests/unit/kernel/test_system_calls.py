"""Thin system calls: errors carry number and path; openat2 keeps within its root."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from katapod.kernel.mount import clone_tree, mount, umount
from katapod.kernel.openat2 import open_in_root
from katapod.kernel.process import ADDR_NO_RANDOMIZE, set_personality
from katapod.kernel.system import load_module


@pytest.fixture
def root(tmp_path: Path) -> int:
    (tmp_path / "root" / "etc").mkdir(parents=True)
    (tmp_path / "root" / "etc" / "file").write_text("inside")
    (tmp_path / "outside").write_text("outside")
    (tmp_path / "root" / "up").symlink_to("../outside")
    (tmp_path / "root" / "absolute").symlink_to("/etc/file")
    return os.open(tmp_path / "root", os.O_PATH | os.O_DIRECTORY)


@pytest.mark.parametrize("path", ["etc/file", "/etc/file", "../../etc/file", "absolute", "etc/../etc/file"])
def test_every_path_starts_at_the_root(root: int, path: str) -> None:
    fd = open_in_root(root, path, os.O_RDONLY)
    assert os.read(fd, 100) == b"inside"
    assert not os.get_inheritable(fd)
    os.close(fd)
    os.close(root)


@pytest.mark.parametrize(
    ("path", "error"), [("up", errno.ENOENT), ("none", errno.ENOENT), ("etc/file/x", errno.ENOTDIR)]
)
def test_nothing_leads_out(root: int, path: str, error: int) -> None:
    with pytest.raises(OSError) as caught:
        open_in_root(root, path, os.O_RDONLY)
    assert (caught.value.errno, caught.value.filename) == (error, path)
    os.close(root)


def test_magic_links_are_not_followed() -> None:
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
    with pytest.raises(OSError) as caught:
        open_in_root(proc, f"{os.getpid()}/root/etc/passwd", os.O_RDONLY)
    assert caught.value.errno == errno.ELOOP
    os.close(proc)


def test_mount_errors_name_the_target() -> None:
    for call in (
        lambda: mount("x", "/none/such", "tmpfs"),
        lambda: umount("/none/such"),
        lambda: clone_tree("/none/such"),
    ):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno in (errno.ENOENT, errno.EPERM)
        assert caught.value.filename == "/none/such"


def test_a_module_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError):
        load_module("/none/such.ko")


def test_a_subreaper_inherits_orphans() -> None:
    script = """
import os, signal
from katapod.kernel.process import become_subreaper
become_subreaper()
reader, writer = os.pipe()
if os.fork() == 0:
    if os.fork() == 0:
        os.read(reader, 1)
        os._exit(7)
    os._exit(0)
os.wait()
os.write(writer, b"x")
_, status = os.wait()
raise SystemExit(os.waitstatus_to_exitcode(status))
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 7


def test_an_unprivileged_unshare_is_refused() -> None:
    script = """
import os
from katapod.kernel.process import CLONE_NEWNS, unshare
if os.geteuid() == 0:
    os.setuid(65534)
try:
    unshare(CLONE_NEWNS)
except PermissionError:
    raise SystemExit(5)
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=60, check=False)
    assert done.returncode == 5, signal.strsignal(-done.returncode) if done.returncode < 0 else done.returncode


@pytest.mark.parametrize(("late", "status"), [(False, -signal.SIGKILL), (True, 127)])
def test_a_child_dies_with_its_parent_and_when_it_comes_too_late(late: bool, status: int) -> None:
    """A parent that dies takes its child along; a child that finds another parent ends by itself."""
    script = f"""
import os, signal, time
from katapod.kernel.process import become_subreaper, die_with_parent
become_subreaper()
reader, writer = os.pipe()
if os.fork() == 0:
    parent = os.getpid()
    if os.fork() == 0:
        if {late}:
            while os.getppid() == parent:
                time.sleep(0.001)
        die_with_parent(parent)
        os.write(writer, b"x")
        time.sleep(100)
        os._exit(0)
    if not {late}:
        os.read(reader, 1)
    os._exit(0)
os.wait()
_, status = os.wait()
code = os.waitstatus_to_exitcode(status)
raise SystemExit(0 if code == {int(status)} else 1)
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0


def test_a_personality_is_inherited_and_put_back() -> None:
    former = set_personality(ADDR_NO_RANDOMIZE)
    try:
        said = subprocess.run(["cat", "/proc/self/personality"], capture_output=True, check=True, text=True).stdout
    finally:
        assert set_personality(former) == ADDR_NO_RANDOMIZE
    assert int(said, 16) == ADDR_NO_RANDOMIZE
