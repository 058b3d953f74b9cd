"""containerd's shim for runc, `io.containerd.runc.v2`, with `kata-runtime` in runc's place."""

import os

from kit.containerd import Containerd
from kit.kata import KATA, wait_for
from kit.oci_archive import BUSYBOX

LOOP = "trap 'exit 3' TERM; echo ready; while :; do sleep 0.1; done"
RUN = ("run", "--runtime", "io.containerd.runc.v2", "--runc-binary", KATA)


def test_a_container_and_its_tasks(ctr: Containerd) -> None:
    done = ctr(*RUN, "--rm", BUSYBOX, ctr.new_id(), "sh", "-c", "cat /proc/sys/kernel/osrelease; exit 4")
    assert done.code == 4
    assert done.stdout not in ("", f"{os.uname().release}\n")
    name = ctr.new_id()
    ctr.ok(*RUN, "--detach", BUSYBOX, name, "sh", "-c", LOOP)
    assert ctr.tasks()[name] == "RUNNING"
    done = ctr("tasks", "exec", "--exec-id", "one", name, "sh", "-c", "echo in exec; exit 9")
    assert (done.code, done.stdout) == (9, "in exec\n")
    ctr.ok("tasks", "pause", name)
    assert ctr.tasks()[name] == "PAUSED"
    ctr.ok("tasks", "resume", name)
    assert "memory.usage_in_bytes" in ctr.ok("tasks", "metrics", name)
    refused = ctr("tasks", "checkpoint", name)
    assert (refused.code, "checkpoint is not supported" in refused.stderr) == (1, True)
    ctr.ok("tasks", "kill", "--signal", "SIGTERM", name)
    wait_for(lambda: ctr.tasks()[name] == "STOPPED", "the end of the container")
    assert ctr.delete(name) == 3
