"""Host facts: what is collected is true of this machine."""

import os
from pathlib import Path

import pytest

from katapod.host.facts import (
    claim_vsock_cid,
    collect_host_facts,
    file_identity,
    host_tsc_khz,
    parse_tsc_khz,
    virtiofsd_implementation,
)
from katapod.model.errors import DeviceMissing, KatapodError
from katapod.plan.virtiofsd import VirtiofsdImplementation


def test_facts() -> None:
    facts = collect_host_facts()
    assert 1 <= facts.cpus <= (os.cpu_count() or 1)
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert abs(facts.mem_mib - int(total.split()[1]) // 1024) <= 1
    assert len(facts.boot_id) == 36
    assert facts.kernel_release == os.uname().release
    if not os.path.exists("/dev/kvm"):
        assert not facts.kvm


@pytest.mark.skipif(os.path.exists("/dev/vhost-vsock"), reason="this host has vsock")
def test_no_vsock_says_what_to_load() -> None:
    with pytest.raises(DeviceMissing, match="cannot open /dev/vhost-vsock") as caught:
        claim_vsock_cid()
    assert "modprobe vhost_vsock" in caught.value.hint


def test_a_file_changes_its_identity_when_it_is_replaced(tmp_path: Path) -> None:
    path, link = tmp_path / "f", tmp_path / "link"
    path.write_text("one")
    link.symlink_to(path)
    first = file_identity(path)
    assert file_identity(link) == first
    (tmp_path / "g").write_text("two")
    os.replace(tmp_path / "g", path)
    assert file_identity(path) != first


@pytest.mark.parametrize(
    ("words", "implementation"), [("using FUSE kernel interface version 7.36", "c"), ("virtiofsd 1.10.0", "rust")]
)
async def test_implementation_of_a_program(tmp_path: Path, words: str, implementation: str) -> None:
    program = tmp_path / "virtiofsd"
    program.write_text(f"#!/bin/sh\necho '{words}'\n")
    program.chmod(0o755)
    assert await virtiofsd_implementation(str(program)) is VirtiofsdImplementation(implementation)


async def test_implementation_of_what_is_no_program(tmp_path: Path) -> None:
    with pytest.raises(KatapodError, match="cannot run"):
        await virtiofsd_implementation(str(tmp_path))


CONSTANT = "processor\t: 0\ncpu MHz\t\t: 1200.000\nflags\t\t: fpu tsc constant_tsc nonstop_tsc\n"


@pytest.mark.parametrize(
    ("cpuinfo", "khz"),
    [
        (CONSTANT + "bogomips\t: 4890.80\n\nprocessor\t: 1\nbogomips\t: 1.00\n", 2445400),
        (CONSTANT.replace("nonstop_tsc", "") + "bogomips\t: 4890.80\n", 0),
        (CONSTANT.replace("constant_tsc", "") + "bogomips\t: 4890.80\n", 0),
        (CONSTANT, 0),
        (CONSTANT + "bogomips\t: many\n", 0),
        ("", 0),
    ],
    ids=["constant", "stops in sleep", "of several rates", "not told", "no number", "empty"],
)
def test_the_rate_of_the_time_stamp_counter(cpuinfo: str, khz: int) -> None:
    assert parse_tsc_khz(cpuinfo) == khz


def test_the_rate_on_this_machine() -> None:
    assert host_tsc_khz() == 0 or 100_000 < host_tsc_khz() < 20_000_000
