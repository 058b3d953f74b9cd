"""A guest's statistics in containerd's messages. guest_stats.json is the answer of a real guest, whose container with
a limit of 64 MiB wrote a file of 8 MiB; an interface was added by hand."""

from pathlib import Path
from typing import Any

from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st

from katapod.rpc.pb import agent_pb2
from katapod.shim.pb import metrics_v1_pb2, metrics_v2_pb2
from katapod.shim.stats import MAX_U64, METRICS_V1_URL, METRICS_V2_URL, encode_stats, metrics_v1, metrics_v2


def guest() -> agent_pb2.StatsContainerResponse:
    text = (Path(__file__).parent / "guest_stats.json").read_text()
    return json_format.Parse(text, agent_pb2.StatsContainerResponse())


def test_v1() -> None:
    found = metrics_v1(guest())
    assert (found.cpu.usage.total, found.cpu.usage.kernel, found.cpu.usage.user) == (372655000, 344301000, 28354000)
    assert (found.pids.current, found.pids.limit) == (2, 0)
    memory = found.memory
    assert (memory.usage.usage, memory.usage.limit, memory.usage.max) == (10768384, 64 << 20, 11743232)
    assert (memory.cache, memory.total_cache) == (10055680, 10055680)
    assert (memory.rss, memory.total_rss) == (114688, 114688)
    assert (memory.inactive_file, memory.total_inactive_file) == (8564736, 8564736)  # the kubelet's working set
    assert (memory.pg_fault, memory.total_pg_maj_fault) == (746, 15)
    assert (memory.kernel.usage, memory.hierarchical_memory_limit) == (450560, 64 << 20)
    assert (memory.swap.usage, memory.swap.limit) == (10768384, 64 << 20)
    entries = [(each.op, each.major, each.minor, each.value) for each in found.blkio.io_service_bytes_recursive]
    assert entries == [("Read", 254, 0, 1667072), ("Write", 254, 0, 8388608)]
    assert [each.value for each in found.blkio.io_serviced_recursive] == [18, 7]
    assert [each.pagesize for each in found.hugetlb] == ["1GB", "2MB"]


def test_v2() -> None:
    found = metrics_v2(guest())
    assert (found.cpu.usage_usec, found.cpu.system_usec, found.cpu.user_usec) == (372655, 344301, 28354)
    memory = found.memory
    assert (memory.usage, memory.usage_limit, memory.max_usage) == (10768384, 64 << 20, 11743232)
    assert (memory.anon, memory.file, memory.file_mapped) == (114688, 10055680, 1466368)
    assert (memory.inactive_file, memory.slab_unreclaimable) == (8564736, 43384)
    assert (memory.pgfault, memory.pgmajfault, memory.kernel_stack) == (746, 15, 16384)
    (device,) = found.io.usage
    assert (device.major, device.minor, device.rbytes, device.wbytes) == (254, 0, 1667072, 8388608)
    assert (device.rios, device.wios) == (18, 7)


def parts(descriptor: Any, prefix: str = "") -> set[str]:
    """The messages within a message, lists left out, by their paths."""
    found = set()
    for field in descriptor.fields:
        if field.message_type is not None and not field.is_repeated:
            found |= {prefix + field.name} | parts(field.message_type, f"{prefix}{field.name}.")
    return found


def present(message: Any, paths: set[str]) -> set[str]:
    found = set()
    for path in paths:
        part, held = message, True
        for name in path.split("."):
            held = held and part.HasField(name)
            part = getattr(part, name)
        if held:
            found.add(path)
    return found


def test_every_part_is_there_whatever_the_guest_says() -> None:
    """CRI-O takes their presence for granted."""
    for convert in (metrics_v1, metrics_v2):
        for stats in (agent_pb2.StatsContainerResponse(), guest()):
            metrics = convert(stats)
            expected = {path for path in parts(metrics.DESCRIPTOR) if "psi" not in path and path != "cgroup_stats"}
            assert present(type(metrics).FromString(metrics.SerializeToString()), expected) == expected


def test_what_only_our_agent_tells() -> None:
    stats = guest()
    stats.cgroup_stats.memory_stats.events.update({"max": 9, "oom": 3, "oom_kill": 2, "oom_group_kill": 1, "new": 7})
    stats.cgroup_stats.memory_stats.stats["sock"] = 4096
    stats.cgroup_stats.hugetlb_stats["2MB"].limit = 2 << 20
    v1, v2 = metrics_v1(stats), metrics_v2(stats)
    assert (v1.memory_oom_control.oom_kill, v1.memory_oom_control.under_oom) == (2, 0)
    assert (v1.memory.kernel_tcp.usage, v1.memory.kernel_tcp.limit, v1.memory.kernel.limit) == (4096, MAX_U64, MAX_U64)
    events = v2.memory_events
    assert (events.max, events.oom, events.oom_kill, events.oom_group_kill, events.high) == (9, 3, 2, 1, 0)
    assert {each.pagesize: each.max for each in v2.hugetlb} == {"1GB": MAX_U64, "2MB": 2 << 20}
    assert (v1.pids.limit, v2.pids.limit) == (0, MAX_U64)  # none: as each version's own files have it


def test_network_in_both() -> None:
    for found in (metrics_v1(guest()), metrics_v2(guest())):
        assert [each.name for each in found.network] == ["lo", "eth0"]
        eth0 = found.network[1]
        assert (eth0.rx_bytes, eth0.rx_packets, eth0.rx_errors, eth0.rx_dropped) == (1200, 12, 1, 2)
        assert (eth0.tx_bytes, eth0.tx_packets, eth0.tx_errors, eth0.tx_dropped) == (900, 9, 3, 4)


def test_a_guest_with_cgroup_v1() -> None:
    stats = agent_pb2.StatsContainerResponse()
    memory = stats.cgroup_stats.memory_stats
    memory.usage.usage, memory.swap_usage.usage, memory.swap_usage.limit = 100, 130, 200
    for key, value in {"rss": 7, "total_rss": 9, "total_inactive_file": 5, "hierarchical_memsw_limit": 200}.items():
        memory.stats[key] = value
    v1, v2 = metrics_v1(stats).memory, metrics_v2(stats).memory
    assert (v1.rss, v1.total_rss, v1.total_inactive_file) == (7, 9, 5)
    assert (v1.swap.usage, v1.swap.limit, v1.hierarchical_swap_limit) == (130, 200, 200)
    assert (v2.anon, v2.inactive_file) == (9, 5)


def test_newer_kernels_split_their_counters() -> None:
    stats = agent_pb2.StatsContainerResponse()
    stats.cgroup_stats.memory_stats.stats["workingset_refault_anon"] = 2
    stats.cgroup_stats.memory_stats.stats["workingset_refault_file"] = 3
    assert metrics_v2(stats).memory.workingset_refault == 5


def test_the_answer_has_the_shape_of_the_host() -> None:
    url, value = encode_stats(guest(), 1)
    assert (url, metrics_v1_pb2.Metrics.FromString(value)) == (METRICS_V1_URL, metrics_v1(guest()))
    url, value = encode_stats(guest(), 2)
    assert (url, metrics_v2_pb2.Metrics.FromString(value)) == (METRICS_V2_URL, metrics_v2(guest()))
    assert url == metrics_v2_pb2.Metrics.DESCRIPTOR.full_name


NUMBER = st.integers(0, MAX_U64)


@given(st.dictionaries(st.text(max_size=20) | st.just("workingset_refault_anon"), NUMBER, max_size=5), NUMBER, NUMBER)
def test_whatever_a_guest_says_fits(stats: dict[str, int], usage: int, swap: int) -> None:
    given_ = agent_pb2.StatsContainerResponse()
    memory = given_.cgroup_stats.memory_stats
    memory.stats.update(stats)
    memory.usage.usage, memory.usage.limit = usage, MAX_U64
    memory.swap_usage.usage, memory.swap_usage.limit = swap, MAX_U64
    found = metrics_v1(given_).memory
    assert found.swap.usage == min(usage + swap, MAX_U64)
    assert found.swap.limit == MAX_U64
    assert metrics_v2(given_).memory.usage == usage
