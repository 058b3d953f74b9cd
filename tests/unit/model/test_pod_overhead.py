"""The arithmetic from observations to a RuntimeClass overhead."""

import pytest

from katapod.model.overhead import MemoryParts, Observation, pod_overhead

MIB = 1024  # KiB
PARTS = MemoryParts(
    guest_mapped_kib=40 * MIB,
    guest_unmapped_kib=30 * MIB,
    translated_kib=44 * MIB,
    vmm_heap_kib=17 * MIB,
    vmm_program_kib=7 * MIB,
    virtiofsd_kib=1 * MIB,
    supervisor_kib=15 * MIB,
)


def seen(**changes: object) -> Observation:
    figures: dict[str, object] = {
        "phase": "idle",
        "memory": PARTS,
        "containers_kib": 2 * MIB,
        "cpu_s": 0.05,
        "containers_cpu_s": 0.01,
        "seconds": 5.0,
    }
    return Observation(**(figures | changes))  # type: ignore[arg-type]


def test_the_rows_are_all_of_it() -> None:
    assert sum(kib for _, kib in PARTS.rows()) == PARTS.total_kib == 154 * MIB
    assert PARTS.pss_kib == 124 * MIB
    assert PARTS.host_kib == 40 * MIB


def test_beyond_the_containers() -> None:
    assert seen().beyond_kib == 152 * MIB
    assert seen().beyond_cpu_millis == pytest.approx(8.0)


def test_a_guest_whose_clock_runs_ahead_gives_nothing_negative() -> None:
    assert seen(containers_cpu_s=1.0).beyond_cpu_millis == 0
    assert seen(containers_kib=1000 * MIB).beyond_kib == 0


def test_the_most_that_was_seen_rounded_up() -> None:
    full = seen(phase="full", containers_kib=1 * MIB, cpu_s=0.02)
    found = pod_overhead([seen(), full])
    assert (found.memory_mib, found.cpu_millis) == (160, 10)
    assert found.yaml() == 'overhead:\n  podFixed:\n    memory: "160Mi"\n    cpu: "10m"'


def test_the_translation_cache_counts_in_full() -> None:
    assert pod_overhead([seen()], translation_cache_mib=128).memory_mib == 240  # 152 - 44 + 128 = 236


def test_a_cache_beyond_its_bound_is_not_taken_off() -> None:
    assert pod_overhead([seen()], translation_cache_mib=32).memory_mib == 160


def test_never_nothing() -> None:
    nothing = seen(memory=MemoryParts(), cpu_s=0.0)
    assert (pod_overhead([nothing]).memory_mib, pod_overhead([nothing]).cpu_millis) == (10, 10)


def test_without_an_observation() -> None:
    with pytest.raises(ValueError, match="empty"):
        pod_overhead([])
