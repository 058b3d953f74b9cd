"""What keeps a process from the host, read from /proc."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from katapod.model.inspection import Confinement
from katapod.observe.confinement import confinement_of


def test_our_own() -> None:
    found = confinement_of(os.getpid())
    assert found is not None
    status = Path("/proc/self/status").read_text()
    assert found.no_new_privileges == ("NoNewPrivs:\t1" in status)
    assert found.seccomp == ("Seccomp:\t0" not in status)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, which has something to lose")
def test_of_one_that_gave_something_up() -> None:
    script = (
        "import os, sys; from katapod.kernel.confine import *; from katapod.kernel.process import *\n"
        "unshare(CLONE_NEWIPC | CLONE_NEWUTS); forbid_new_privileges(); set_capabilities(frozenset({0, 5}))\n"
        "print('ready', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdin is not None
    with child.stdin, child.stdout:
        assert child.stdout.readline() == b"ready\n"
        found = confinement_of(child.pid)
    child.wait()
    assert found is not None
    assert (found.capabilities, found.no_new_privileges) == ((0, 5), True)
    assert {"ipc", "uts"} <= set(found.namespaces)


def test_of_none() -> None:
    assert confinement_of(1 << 22) is None
    assert Confinement() == Confinement(capabilities=(), no_new_privileges=False, seccomp=False, namespaces=())
