"""Containers that run on while containerd is away."""

import signal
from pathlib import Path

import pytest

from kit.containerd import Containerd
from kit.kata import wait_for
from kit.oci_archive import BUSYBOX


@pytest.mark.reference
@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGKILL], ids=lambda by: by.name)
def test_containers_outlive_containerd(ctr: Containerd, runtime: str, tmp_path: Path, by: signal.Signals) -> None:
    """One goes on and one ends meanwhile; both are known afterwards, with true exit statuses."""
    mount = f"type=bind,src={tmp_path},dst=/mnt,options=rbind:rw"
    goes_on, ends = ctr.new_id(), ctr.new_id()
    obedient = "trap 'exit 5' TERM; while :; do echo x >> /mnt/beats; sleep 0.1; done"
    ending = "until test -e /mnt/end; do sleep 0.1; done; echo ended > /mnt/ended; exit 6"
    for container, body in ((goes_on, obedient), (ends, ending)):
        flags = ["--detach", "--runtime", runtime, "--mount", mount]
        ctr.ok("run", *flags, BUSYBOX, container, "sh", "-c", body)
    beats = tmp_path / "beats"
    wait_for(lambda: beats.stat().st_size > 0, "it beats")

    ctr.stop(by)
    try:
        before = beats.stat().st_size
        wait_for(lambda: beats.stat().st_size > before, "it beats without containerd")
        (tmp_path / "end").touch()
        wait_for(lambda: (tmp_path / "ended").exists(), "the other one ends")
    finally:
        ctr.start()

    wait_for(lambda: ctr.tasks() == {goes_on: "RUNNING", ends: "STOPPED"}, "both are known again")
    assert ctr("tasks", "exec", "--exec-id", "e1", goes_on, "echo", "well") == (0, "well\n", "")
    ctr.ok("tasks", "kill", "--signal", "SIGTERM", goes_on)
    wait_for(lambda: ctr.tasks()[goes_on] == "STOPPED", "the signal arrives")
    assert ctr.delete(goes_on) == 5
    assert ctr.delete(ends) == 6


def test_a_new_container_after_a_restart(ctr: Containerd, runtime: str) -> None:
    ctr.stop()
    ctr.start()
    assert ctr.ok("run", "--rm", "--runtime", runtime, BUSYBOX, ctr.new_id(), "echo", "again") == "again\n"
