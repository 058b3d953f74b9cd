"""Programs under User-mode Linux keep their registers across signals, threads, processes and system calls.

Its kernel takes them from the processor and gives them back by ptrace(2), at each system call, signal and switch. Ten
seconds by default; KATAPOD_TESTS_TORTURE_S=3600 is an hour.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from katapod.model.flavour import initrd_link
from kit.kata import Kata

DISK = Path("/var/cache/kata-containers") / initrd_link("agent", "uml")
SOURCE = Path(__file__).resolve().parents[1] / "kit/torture.c"
SECONDS = int(os.environ.get("KATAPOD_TESTS_TORTURE_S", "10"))
LIMIT_S = SECONDS + 600

pytestmark = pytest.mark.skipif(not DISK.exists(), reason="needs a guest image for User-mode Linux: image build")


@pytest.fixture(scope="module")
def program(debian_rootfs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the static program `torture`."""
    folder = tmp_path_factory.mktemp("torture")
    compiler = (
        "gcc",
        "-static",
        "-O2",
        "-pthread",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-x",
        "c",
        "-o",
        "/tmp/torture",
        "-",
    )
    source = SOURCE.read_bytes()
    command = ["chroot", str(debian_rootfs), *compiler]
    built = subprocess.run(command, input=source, capture_output=True, timeout=180, check=False)
    assert built.returncode == 0, built.stderr.decode()
    shutil.move(debian_rootfs / "tmp/torture", folder)
    return folder


@pytest.mark.timeout(LIMIT_S + 300)
def test_registers_are_kept(kata: Kata, program: Path) -> None:
    alone = subprocess.run([program / "torture", "1"], capture_output=True, text=True, timeout=180, check=False)
    if alone.returncode == 2:
        pytest.skip(alone.stderr)
    assert alone.returncode == 0, alone.stderr
    command = ("-v", f"{program}:/torture:ro", "busybox", "/torture/torture", str(SECONDS))
    inside = kata.run("--accel", "uml", "--net", "none", *command, timeout=LIMIT_S)
    print(inside.stderr)  # how many rounds there were: pytest -rP shows it
    assert (inside.code, inside.stdout) == (0, alone.stdout), inside.stderr
