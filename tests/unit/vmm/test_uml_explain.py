"""What inspect says of a User-mode Linux kernel's command line, and where it finds one."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec import structs
from test_uml_plan import NIC, VM

from katapod.observe.explain import explain_kernel_parameters
from katapod.vmm.errors import VmmLinkBroken
from katapod.vmm.uml.control import connected_uml
from katapod.vmm.uml.plan import FdSlot, argv0_of, plan_uml, render_uml
from katapod.vmm.uml.vmm import Uml

COMMAND = [argv0_of(VM.vm_dir), *render_uml(plan_uml(VM, nics=[NIC]), {FdSlot.CONSOLE: 7})]


def test_all_that_is_written_is_explained() -> None:
    parts = Uml().explain(COMMAND)
    assert [part.part for part in parts if not part.known] == []
    assert parts[0].part == COMMAND[0]
    assert "vec0:transport=tap,ifname=tap0_kata,mac=52:54:00:12:34:56,mtu=9000,gro=1" in [part.part for part in parts]


def test_what_is_the_guests_own_are_kernel_parameters() -> None:
    assert Uml().kernel_parameters_in(COMMAND) == Uml().kernel_params(VM)
    assert (Uml().explain([]), Uml().kernel_parameters_in([])) == ((), "")


def test_the_guests_parameters_are_explained() -> None:
    usual = structs.replace(VM, kernel_params=())
    for spec in (usual, structs.replace(usual, debug=True, debug_console=True)):
        parts = explain_kernel_parameters(Uml().kernel_params(spec))
        assert [part.part for part in parts if not part.known] == []


def test_virtio_devices_by_their_kind() -> None:
    said = {part.part: part.meaning for part in Uml().explain([COMMAND[0], "virtio_uml.device=/s/disk-a.sock:2"])}
    assert said["virtio_uml.device=/s/disk-a.sock:2"].startswith("a disk")


def test_what_is_not_known_is_said_to_be() -> None:
    (part,) = [part for part in Uml().explain([COMMAND[0], "mem=1M", "vector=7", "lpj=1"]) if not part.known]
    assert part.part == "vector=7"


async def test_a_kernel_that_does_not_run_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(VmmLinkBroken, match="it has ended"):
        async with connected_uml(tmp_path, 1.0):
            pass


@pytest.fixture
def impostor(tmp_path: Path) -> Iterator[Path]:
    """A machine's directory that a process of another kind has in its name."""
    process = subprocess.Popen([argv0_of(tmp_path), "-c", "input()"], executable=sys.executable, stdin=subprocess.PIPE)
    yield tmp_path
    process.communicate(b"\n")


async def test_a_process_that_only_has_its_name_is_not_taken_for_it(impostor: Path) -> None:
    """Its helpers have: it is process 1 of a PID namespace."""
    with pytest.raises(VmmLinkBroken, match="it has ended"):
        async with connected_uml(impostor, 1.0):
            pass
