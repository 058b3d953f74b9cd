"""The one formula for size."""

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from katapod.model.config import parse_config
from katapod.model.config_keys import declaration
from katapod.model.errors import UsageError
from katapod.model.sizing import (
    HOST_OVERHEAD_MIB,
    MEMORY_BLOCK_MIB,
    MIN_BOOT_MIB,
    ContainerLimits,
    HostCapacity,
    SizeSettings,
    VmSize,
    size_pod,
    size_sandbox,
)

MIB = 1 << 20
GIB = 1 << 30
HOST = HostCapacity(cpus=8, memory_mib=64 * 1024)
SETTINGS = SizeSettings()


def size(*containers: ContainerLimits, settings: SizeSettings = SETTINGS, host: HostCapacity = HOST) -> VmSize:
    return size_sandbox(settings, host, containers)


def limit(memory_bytes: int) -> ContainerLimits:
    return ContainerLimits(memory_bytes=memory_bytes)


def cpus(number: float) -> ContainerLimits:
    return ContainerLimits(cpus=number)


@pytest.mark.parametrize(
    ("limits", "mem_mib"),
    [
        ((), 2048),
        ((ContainerLimits(),), 2048),
        ((limit(6 * MIB),), 256),
        ((limit(64 * MIB),), 256),
        ((limit(65 * MIB),), 384),
        ((limit(512 * MIB),), 768),
        ((limit(GIB),), 1280),
        ((limit(GIB), limit(GIB)), 2304),
        ((limit(4 * GIB),), 4352),
        ((limit(16 * GIB),), 16384 + 192 + 192),
        ((limit(GIB), ContainerLimits()), 3072),
    ],
)
def test_memory(limits: tuple[ContainerLimits, ...], mem_mib: int) -> None:
    assert size(*limits).mem_mib == math.ceil(mem_mib / MEMORY_BLOCK_MIB) * MEMORY_BLOCK_MIB


def test_overhead_is_configurable_and_part_of_the_size() -> None:
    small = size(limit(GIB), settings=SizeSettings(guest_base_memory_mib=64))
    assert (small.mem_mib, small.guest_overhead_mib) == (1152, 64)
    assert small.sandbox_cgroup_mib == 1152 + HOST_OVERHEAD_MIB


def test_the_translation_cache_counts_for_the_host() -> None:
    found = size_sandbox(SETTINGS, HOST, (limit(GIB),), translation_cache_mib=256)
    assert found.host_overhead_mib == HOST_OVERHEAD_MIB + 256
    assert found.mem_mib == size(limit(GIB)).mem_mib


def test_limits_above_the_hosts_memory_get_what_there_is() -> None:
    found = size(limit(100 * GIB))
    assert (found.mem_mib, found.max_mem_mib) == (65536, 65536)
    (told,) = found.clamped
    assert re.fullmatch(
        r"its memory limits ask for a VM of 10\d+ MiB and this host has 65536 MiB: it gets 65536 MiB, "
        r"and the limits stay",
        told,
    )
    assert size(limit(64 * GIB)).mem_mib == 65536
    assert size(limit(1 << 62)).mem_mib == 65536
    small = size(limit(GIB), settings=SizeSettings(default_maxmemory_mib=1100))
    assert small.mem_mib == 1024
    assert "default_maxmemory is 1100 MiB" in small.clamped[0]
    assert size(limit(GIB)).clamped == size().clamped == ()


def test_so_do_those_of_a_pod() -> None:
    for static in (False, True):
        found = size_pod(SETTINGS, HOST, announced=limit(100 * GIB), static=static)
        assert found.mem_mib == 65536
        assert len(found.clamped) == 1
    grown = size_pod(SETTINGS, HOST, (limit(40 * GIB), limit(40 * GIB)))
    assert (grown.mem_mib, len(grown.clamped)) == (65536, 1)


def test_a_small_host_gets_what_it_has_when_nobody_asked_for_more() -> None:
    assert size(host=HostCapacity(cpus=1, memory_mib=1950)).mem_mib == 1920
    with pytest.raises(UsageError, match="this host has 200 MiB"):
        size(host=HostCapacity(cpus=1, memory_mib=200))


@pytest.mark.parametrize(
    ("limits", "vcpus"),
    [
        ((), 1),
        ((ContainerLimits(),), 1),
        ((cpus(0.5),), 1),
        ((cpus(1),), 1),
        ((cpus(1.5),), 2),
        ((cpus(2),), 2),
        ((cpus(0.1), cpus(0.1), cpus(0.8)), 1),
        ((cpus(2), ContainerLimits()), 3),
        ((cpus(6), cpus(6)), 8),
        ((cpus(8),), 8),
    ],
)
def test_vcpus(limits: tuple[ContainerLimits, ...], vcpus: int) -> None:
    found = size(*limits)
    assert (found.vcpus, found.max_vcpus) == (vcpus, 8)


@pytest.mark.parametrize(
    ("default", "maximum", "vcpus", "max_vcpus"),
    [(1.5, 0, 2, 8), (-1, 0, 8, 8), (0, 0, 1, 8), (99, 0, 8, 8), (2, 4, 2, 4), (6, 4, 4, 4), (1, 99, 1, 8)],
)
def test_default_vcpus(default: float, maximum: int, vcpus: int, max_vcpus: int) -> None:
    found = size(settings=SizeSettings(default_vcpus=default, default_maxvcpus=maximum))
    assert (found.vcpus, found.max_vcpus) == (vcpus, max_vcpus)


def test_more_cpus_than_the_host_has() -> None:
    found = size(cpus(9))
    assert (found.vcpus, found.clamped) == (8, ("its CPU limit of 9 is more than the 8 vCPUs that it can have",))
    assert size(cpus(5), settings=SizeSettings(default_maxvcpus=4)).vcpus == 4


def test_settings_come_from_the_configuration() -> None:
    text = b"[hypervisor.qemu]\ndefault_memory=512\ndefault_vcpus=2\ndefault_maxvcpus=4\ndefault_maxmemory=8192\n"
    text += b"[katapod]\nguest_base_memory=100\n"
    assert SizeSettings.of(parse_config(text).config) == SizeSettings(
        default_memory_mib=512,
        default_maxmemory_mib=8192,
        guest_base_memory_mib=100,
        default_vcpus=2,
        default_maxvcpus=4,
    )
    assert SizeSettings.of(parse_config(b"").config) == SizeSettings()


def test_describe_has_the_numbers() -> None:
    assert size(limit(GIB)).describe() == (
        "1 of at most 8 vCPUs, 1280 of at most 65536 MiB, of which 192 for the guest; 128 MiB beside on the host"
    )


@settings(max_examples=100)
@given(
    st.lists(
        st.builds(
            ContainerLimits,
            memory_bytes=st.none() | st.integers(6 * MIB, 8 * GIB),
            cpus=st.none() | st.floats(0.01, 8),
        ),
        max_size=6,
    )
)
def test_every_container_fits_and_the_cgroup_holds_the_vm(containers: list[ContainerLimits]) -> None:
    found = size(*containers)
    wanted = sum(c.memory_bytes or 0 for c in containers)
    assert found.mem_mib * MIB >= wanted + found.guest_overhead_mib * MIB
    assert found.mem_mib >= MIN_BOOT_MIB
    assert found.mem_mib % MEMORY_BLOCK_MIB == 0
    assert found.max_mem_mib >= found.mem_mib
    assert found.sandbox_cgroup_mib > found.mem_mib
    assert 1 <= found.vcpus <= found.max_vcpus == 8
    if containers and all(c.memory_bytes for c in containers):
        assert found.sandbox_cgroup_mib * MIB <= wanted + found.pod_overhead_mib * MIB


def test_the_least_memory_is_that_of_the_configuration() -> None:
    found = declaration("hypervisor.qemu", "default_memory")
    assert found is not None
    assert found[1].minimum == MIN_BOOT_MIB
