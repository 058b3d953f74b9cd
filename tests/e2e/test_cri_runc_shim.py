"""Pods by the CRI with containerd's shim for runc, which has `kata-runtime` in runc's place (`BinaryName`)."""

import json
import os
from collections.abc import Iterator

import pytest

from kit.containerd import K8S, RUNC_ROOT, Containerd
from kit.cri import Cri
from kit.kata import wait_for

HANDLER = "kata-runc"
LOOP = "trap 'exit 3' TERM; echo ready; while :; do sleep 0.1; done"
PAGE = "echo page > /tmp/index.html; exec httpd -f -p 80 -h /tmp"


@pytest.fixture
def cri(node: Containerd) -> Iterator[Cri]:
    found = Cri(node, HANDLER)
    try:
        yield found
        found.remove_all()
    finally:
        found.close()


def _sandbox(container: str) -> str:
    return str(json.loads((RUNC_ROOT / K8S / container / "state.json").read_text())["sandbox"])


def test_a_pod_is_one_vm(cri: Cri) -> None:
    """The pause container and two others, whose processes the shim asks for one by one."""
    pod = cri.run_pod()
    looping = pod.start("sh", "-c", LOOP, name="looping")
    serving = pod.start("sh", "-c", PAGE, name="serving")
    assert {_sandbox(each) for each in (looping, serving)} == {_sandbox(pod.id)}
    wait_for(lambda: pod.log_text(looping) == ["ready"], "the first line of the log")
    assert pod.exec(looping, "sh", "-c", "echo in exec; exit 9")[:2] == (9, "in exec\n")
    assert pod.sh(looping, "cat /proc/sys/kernel/osrelease") != f"{os.uname().release}\n"
    assert pod.sh(looping, "hostname") == pod.sh(serving, "hostname")
    get = ("wget", "-q", "-O", "-", "http://127.0.0.1/")
    wait_for(lambda: pod.exec(looping, *get).stdout == "page\n", "an answer of the other container", period_s=1)
    assert cri("ContainerStats", container_id=looping).stats.memory.working_set_bytes.value > 0
    cri("StopContainer", container_id=looping, timeout=200)
    assert pod.container(looping).exit_code == 3
    again = pod.start("sh", "-c", "echo again; exec sleep 100000", name="looping")
    assert _sandbox(again) == _sandbox(pod.id)
    wait_for(lambda: pod.log_text(again) == ["again"], "the second attempt is up")
    cri("StopPodSandbox", pod_sandbox_id=pod.id)
    assert pod.wait_exit(serving) == 137
    sandbox = pod.id
    pod.stop_and_remove()
    assert not [name for name in os.listdir(RUNC_ROOT / K8S) if sandbox in name]
