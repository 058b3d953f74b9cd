"""The mount namespace of a supervisor: what it mounts, and what the host does meanwhile; in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

OWNER = """
import asyncio, os, sys
from pathlib import Path
from katapod.host.mountinfo import mounts_below
from katapod.host.mounts import bind, mount_given
from katapod.host.own_mounts import in_host_mounts, leave_host_mounts
from katapod.host.process import run
from katapod.kernel.mount import MS_BIND, MS_PRIVATE, MS_REC, MS_SHARED, mount, umount
from katapod.kernel.process import CLONE_NEWNS, unshare

folder, shared = Path(sys.argv[1]), sys.argv[2] != "private"
unshare(CLONE_NEWNS)  # stands for the host
mount("none", "/", None, MS_REC | MS_PRIVATE)
if shared:
    mount("none", "/", None, MS_REC | MS_SHARED)
if sys.argv[2] == "chroot":
    for each in ("proc", "dev", "usr", "lib", "lib64", "bin"):
        (folder / each).mkdir()
        mount(f"/{each}", str(folder / each), None, MS_BIND | MS_REC)
    os.chroot(folder)
    folder = Path("/work")
    folder.mkdir()
os.chdir(folder)
leave_host_mounts()
leave_host_mounts()
assert os.getcwd() == str(folder)
late, own = folder / "late", folder / "own"
for each in (late, own):
    each.mkdir()

def host_mounts():
    mount("tmpfs", str(late), "tmpfs")
    (late / "file").touch()

in_host_mounts(host_mounts)
assert (late / "file").exists() == shared, "propagated or not"
bind(late, folder / "volume")
mount_given("bind", str(late), ["rbind", "ro"], own)
assert (folder / "volume" / "file").exists() and (own / "file").exists()
bind(own, folder / "again", own=True)
assert (folder / "again" / "file").exists()
mine = [str(folder / name) for name in ("again", "own", "volume")]
assert sorted(set(mounts_below(folder)) - {str(late)}) == mine
assert in_host_mounts(lambda: mounts_below(folder)) == [str(late)]
said = asyncio.run(run(["/bin/cat", "/proc/self/mountinfo"], host_mounts=True)).stdout
assert str(late) in said and str(own) not in said
in_host_mounts(lambda: umount(str(late)))
in_host_mounts(lambda: late.rmdir())  # not busy, though what was mounted there lives on here
in_host_mounts(lambda: (folder / "again").rmdir())
assert mounts_below(late) == mounts_below(folder / "again") == []
print("done")
"""


@pytest.mark.parametrize("host", ["shared", "private", "chroot"])
def test_what_a_supervisor_mounts(tmp_path: Path, host: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OWNER, str(tmp_path), host], capture_output=True, text=True, check=False, timeout=180
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", ""), done.stderr
