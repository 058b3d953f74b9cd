"""The size of a pod's VM as its containers come."""

from hypothesis import given
from hypothesis import strategies as st

from katapod.model.sizing import ContainerLimits, HostCapacity, SizeSettings, VmSize, size_pod, size_sandbox

MIB, GIB = 1 << 20, 1 << 30
HOST = HostCapacity(cpus=8, memory_mib=64 * 1024)
SETTINGS = SizeSettings()


def limits(memory_bytes: int | None = None, cpus: float | None = None) -> ContainerLimits:
    return ContainerLimits(memory_bytes=memory_bytes, cpus=cpus)


def size(*containers: ContainerLimits, announced: ContainerLimits | None = None, static: bool = False) -> VmSize:
    return size_pod(SETTINGS, HOST, containers, announced=announced, static=static)


def test_a_pod_of_which_nothing_is_known_starts_small_with_room_to_grow() -> None:
    found = size()
    assert (found.mem_mib, found.vcpus) == (256, 1)
    assert found.max_mem_mib > 60 * 1024
    assert found.max_vcpus == 8


def test_a_limit_of_64_mib_starts() -> None:
    assert size(limits(64 * MIB)).mem_mib == 256
    assert size(announced=limits(64 * MIB)).mem_mib == 256


def test_6_gib_and_2_cpus_is_not_8_gib_and_3_cpus() -> None:
    for found in (size(limits(6 * GIB, 2)), size(announced=limits(6 * GIB, 2))):
        assert 6 * 1024 + 192 <= found.mem_mib <= 6 * 1024 + 192 + 32 + 128
        assert found.vcpus == 2


def test_a_container_without_limits_gets_the_defaults() -> None:
    assert size(limits()).mem_mib == 2048
    assert size(announced=limits()).mem_mib == 2048


def test_what_is_announced_is_there_before_the_containers_and_does_not_count_twice() -> None:
    announced = limits(3 * GIB, 3)
    first, second = limits(GIB, 1), limits(2 * GIB, 2)
    sizes = [size(*some, announced=announced) for some in ((), (first,), (first, second))]
    assert len(set(sizes)) == 1
    assert sizes[0] == size(first, second)


def test_a_container_beyond_what_was_announced_counts() -> None:
    announced = limits(GIB, 1)
    assert size(limits(GIB, 1), limits(GIB, 1), announced=announced) == size(limits(2 * GIB, 2))


def test_mixed_limits_get_the_default_beside_their_sum() -> None:
    announced = limits(GIB)  # the kubelet's sum leaves out those without a limit
    assert size(announced=announced).mem_mib == 1280
    assert size(limits(GIB), limits(), announced=announced).mem_mib == 2048 + 1024


def test_many_containers_add_up() -> None:
    assert size(*[limits(100 * MIB, 0.1)] * 20).mem_mib == 2304
    assert size(*[limits(100 * MIB, 0.1)] * 20).vcpus == 2


def test_a_container_that_has_ended_does_not_count() -> None:
    assert size(limits(GIB)).mem_mib < size(limits(GIB), limits(GIB)).mem_mib


def test_more_cpus_than_there_are_is_all_of_them() -> None:
    assert size(limits(GIB, 64)).vcpus == 8
    assert size(announced=limits(GIB, 64)).vcpus == 8
    assert size(announced=limits(GIB, 64), static=True).vcpus == 8


def test_cpus_asked_for_are_there_and_do_not_add_to_the_default() -> None:
    assert size_pod(SETTINGS, HOST, (limits(),), announced=limits(), cpus_asked=1).vcpus == 1
    assert size_pod(SETTINGS, HOST, (limits(),), announced=limits(), cpus_asked=4).vcpus == 4
    assert size_pod(SETTINGS, HOST, (limits(),), announced=limits(), cpus_asked=40).vcpus == 8


def test_static_sizing_leaves_no_room_and_does_not_change_with_the_containers() -> None:
    announced = limits(GIB, 2)
    found = size(announced=announced, static=True)
    assert (found.max_mem_mib, found.max_vcpus) == (found.mem_mib, found.vcpus) == (1280, 2)
    assert size(limits(8 * GIB, 4), announced=announced, static=True) == found


def test_static_sizing_without_a_word_of_the_kubelet_takes_the_defaults() -> None:
    found = size(static=True)
    assert (found.mem_mib, found.vcpus) == (2048, 1)


LIMITS = st.builds(
    ContainerLimits,
    memory_bytes=st.none() | st.integers(MIB, 4 * GIB),
    cpus=st.none() | st.floats(0.01, 16),
)


@given(st.lists(LIMITS, max_size=6), st.none() | LIMITS)
def test_never_less_than_its_containers_need(
    containers: list[ContainerLimits], announced: ContainerLimits | None
) -> None:
    found = size(*containers, announced=announced)
    assert found.mem_mib <= found.max_mem_mib
    assert 1 <= found.vcpus <= found.max_vcpus
    assert found.sandbox_cgroup_mib > found.mem_mib
    if containers:
        capped = tuple(
            limits(each.memory_bytes, None if each.cpus is None else min(each.cpus, 8)) for each in containers
        )
        assert found.mem_mib >= size_sandbox(SETTINGS, HOST, capped).mem_mib
        assert found.vcpus >= size_sandbox(SETTINGS, HOST, capped).vcpus
