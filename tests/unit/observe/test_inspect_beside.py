"""Inspect beside a supervisor that is stopped by a signal: it is not waited for, and the VMM is asked."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from katapod.host.state import StateStore
from katapod.model import inspection as facts
from katapod.model.errors import KatapodError
from katapod.model.inspection import Hypervisor, Missing
from katapod.model.record import State
from katapod.observe import inspection
from katapod.vmm.errors import VmmLinkBroken
from kit.library import layout_below

SUPERVISOR = """
import os, signal, sys
from pathlib import Path
from katapod.host.state import StateStore
from katapod.model.devices import DeviceRecord, DeviceTable, MemoryEntry, NicEntry
from katapod.host.device_file import DeviceFile
from katapod.model.record import SandboxRecord, State
from kit.library import layout_below

store = StateStore(layout_below(Path(sys.argv[1])))
vmm = int(sys.argv[2])
record = SandboxRecord("s1", 1.0, os.getpid(), "b", state=State.RUNNING, vmm_pid=vmm, accelerator="tcg")
store.create(record)
nic = NicEntry(0, 31, "eth0", "tap0_kata", "02:00:00:00:00:01", 1500, guest_path="02/1f")
DeviceFile(store.layout.sandbox("s1")).write(DeviceRecord(1, DeviceTable(nics=(nic,)), MemoryEntry(256, 1024)))
print("there", flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
"""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StateStore]:
    """A sandbox "s1" whose supervisor is stopped, and whose VMM is another process."""
    with subprocess.Popen(["sleep", "100"]) as vmm:
        command = [sys.executable, "-c", SUPERVISOR, str(tmp_path), str(vmm.pid)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": ":".join(sys.path)}
        ) as one:
            assert one.stdout is not None
            assert one.stdout.readline() == "there\n"
            os.waitpid(one.pid, os.WUNTRACED)
            yield StateStore(layout_below(tmp_path))
            one.kill()
        vmm.kill()


def told(monkeypatch: pytest.MonkeyPatch, answer: Hypervisor | KatapodError) -> None:
    async def ask(store: Any, sandbox_id: str, limit_s: float) -> tuple[Hypervisor, list[Missing]]:
        if isinstance(answer, KatapodError):
            raise answer
        return answer, []

    monkeypatch.setattr(inspection, "ask_vmm", ask)


async def test_the_vmm_is_asked(store: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, Hypervisor(status="running", devices=(facts.Device(device_id="n", guest_path="02/1f"),)))
    found = await inspection.collect_facts(store, "s1")
    assert found.state == State.RUNNING.value
    assert found.hypervisor is not None
    assert [(one.name, one.in_vmm) for one in found.devices] == [("eth0", True)]
    reasons = {one.part: one.why for one in found.missing}
    assert "is stopped by a signal (SIGSTOP), and nobody else can ask its agent" in reasons["guest"]
    assert "hypervisor" not in reasons
    assert {one.role for one in found.processes} == {"supervisor", "vmm"}


async def test_a_vmm_that_does_not_answer_either(store: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, VmmLinkBroken("cannot connect to it"))
    found = await inspection.collect_facts(store, "s1")
    assert found.hypervisor is None
    assert [one.in_vmm for one in found.devices] == [None]
    assert Missing("hypervisor", "cannot connect to it") in found.missing
