"""/proc/cpuinfo that lacks its last line."""

from __future__ import annotations

from pathlib import Path

import pytest

from katapod.agent.cpuinfo import mend_cpuinfo
from katapod.rpc.pb import oci_pb2

UML = "processor\t: 0\nbogomips\t: 6122.70\n"


def mounts_of(tmp_path: Path, said: str, *destinations: str, masked: bool = True) -> list[tuple[str, str]]:
    spec = oci_pb2.Spec()
    if masked:
        spec.Linux.MaskedPaths.append("/proc/kcore")
    for destination in destinations:
        spec.Mounts.add(destination=destination, type="proc", source="proc")
    (tmp_path / "said").write_text(said)
    mend_cpuinfo(spec, str(tmp_path / "said"), str(tmp_path))
    return [(mount.destination, mount.source) for mount in spec.Mounts[len(destinations) :]]


def test_a_container_gets_the_line_that_is_missing(tmp_path: Path) -> None:
    for _ in range(2):
        assert mounts_of(tmp_path, UML, "/proc") == [("/proc/cpuinfo", f"{tmp_path}/cpuinfo")]
    assert (tmp_path / "cpuinfo").read_text() == UML + "\n"


@pytest.mark.parametrize(
    ("said", "destinations"),
    [(UML + "\n", ("/proc",)), ("", ("/proc",)), (UML, ()), (UML, ("/proc", "/proc/cpuinfo"))],
)
def test_nothing_is_done_without_need(tmp_path: Path, said: str, destinations: tuple[str, ...]) -> None:
    assert mounts_of(tmp_path, said, *destinations) == []
    assert not (tmp_path / "cpuinfo").exists()


def test_a_proc_that_a_container_may_mount_again_stays_free_of_mounts(tmp_path: Path) -> None:
    assert mounts_of(tmp_path, UML, "/proc", masked=False) == []
