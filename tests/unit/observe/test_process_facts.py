"""Which processes of a sandbox are told of, and as what."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from katapod.observe import process_facts
from katapod.observe.process_facts import sandbox_processes


@contextmanager
def running(argv0: str) -> Iterator[int]:
    """A shell of that name, once it shows its command line."""
    words = [argv0, "-c", "echo; read line"]
    with subprocess.Popen(words, executable="/bin/sh", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process.pid
        finally:
            process.kill()


def test_roles() -> None:
    """A helper has the VMM's name, or any other: what the VMM has started is a helper."""
    script = "sleep 1000 & echo; wait"
    with (
        subprocess.Popen(
            ["linux.uml /run/vc/vm/s1", "-c", script], executable="/bin/sh", stdout=subprocess.PIPE
        ) as vmm,
        running("virtiofsd") as share,
        running("qemu-storage-daemon /run/vc/vm/s1") as disks,
        running("other") as other,
    ):
        assert vmm.stdout is not None
        vmm.stdout.readline()
        try:
            found = {one.pid: one for one in sandbox_processes(os.getpid(), vmm.pid)}
            roles = {pid: one.role for pid, one in found.items()}
            (helper,) = [pid for pid, role in roles.items() if role == "vmm-helper"]
            assert {pid: roles[pid] for pid in (os.getpid(), vmm.pid, share, disks, other)} == {
                os.getpid(): "supervisor",
                vmm.pid: "vmm",
                share: "virtiofsd",
                disks: "storage",
                other: "other",
            }
            assert found[helper].parent == vmm.pid
            assert found[vmm.pid].program == "linux.uml"
        finally:
            vmm.kill()
            os.kill(helper, 9)


def test_supervisor_and_vmm_are_told_of_however_many_others_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_facts, "PROCESSES_MAX", 3)
    with ExitStack() as stack:
        pids = []
        for _ in range(4):
            process = stack.enter_context(subprocess.Popen(["sleep", "600"]))
            stack.callback(process.kill)
            pids.append(process.pid)
        vmm = max(pids)
        found = sandbox_processes(os.getpid(), vmm)
        assert {each.role for each in found} >= {"supervisor", "vmm"}
        assert len(found) == 3
        assert vmm in [each.pid for each in found]
        assert [each.pid for each in sandbox_processes(vmm, 0)] == [vmm]
