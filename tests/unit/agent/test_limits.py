"""Limits that follow the guest's memory: from the values of a boot with 256 MiB to those of a larger boot, both as they
were read in guests with Linux 6.1.0-57-cloud-amd64."""

from pathlib import Path

import pytest

from katapod.agent import limits
from katapod.rpc.status import RpcError

MIB = 1 << 20
BOOT_256 = {
    "kernel/threads-max": (1610,),
    **{f"user/max_{kind}_namespaces": (805,) for kind in limits.NAMESPACES},
    "user/max_inotify_watches": (8192,),
    "user/max_fanotify_marks": (8192,),
    "fs/file-max": (20170,),
    "fs/epoll/max_user_watches": (45879,),
    "net/ipv4/inet_peer_threshold": (10996,),
    "net/ipv4/tcp_mem": (2382, 3179, 4764),
    "net/ipv4/udp_mem": (4767, 6358, 9534),
    "net/ipv4/tcp_rmem": (4096, 131072, 1627744),
    "net/ipv4/tcp_wmem": (4096, 16384, 1627744),
    "net/ipv4/tcp_max_orphans": (1024,),
    "net/ipv4/tcp_max_tw_buckets": (1024,),
    "net/ipv4/tcp_max_syn_backlog": (128,),
}
BOOT_3328 = {
    "kernel/threads-max": (25757,),
    **{f"user/max_{kind}_namespaces": (12878,) for kind in limits.NAMESPACES},
    "user/max_inotify_watches": (25118,),
    "user/max_fanotify_marks": (26708,),
    "fs/file-max": (329215,),
    "fs/epoll/max_user_watches": (733918,),
    "net/ipv4/inet_peer_threshold": (65664,),
    "net/ipv4/tcp_mem": (37446, 49931, 74892),
    "net/ipv4/udp_mem": (74895, 99863, 149790),
    "net/ipv4/tcp_rmem": (4096, 131072, 6291456),
    "net/ipv4/tcp_wmem": (4096, 16384, 4194304),
    "net/ipv4/tcp_max_orphans": (16384,),
    "net/ipv4/tcp_max_tw_buckets": (16384,),
    "net/ipv4/tcp_max_syn_backlog": (256,),
}
HIGH_256, HIGH_3328 = 2816 // 4, 101376 // 4  # pages


def test_as_a_boot_with_more_memory_would_have_made_them() -> None:
    derived = limits.derive_limits(BOOT_256, (3328 - 256) * MIB, high_pages=HIGH_3328)
    assert derived.keys() == BOOT_3328.keys() == set(limits.KEYS)
    for key, wanted in BOOT_3328.items():
        # the kernel counts to the page at moments of its boot that differ
        assert tuple(map(int, derived[key].split())) == pytest.approx(wanted, rel=0.0005), key


def test_nothing_added_changes_nothing() -> None:
    derived = limits.derive_limits(BOOT_256, 0, high_pages=HIGH_256)
    for key, wanted in BOOT_256.items():
        assert tuple(map(int, derived[key].split())) == pytest.approx(wanted, rel=0.002), key


def test_large_memory_meets_the_kernels_own_bounds() -> None:
    derived = limits.derive_limits(BOOT_256, 1 << 40, high_pages=0)
    assert derived["user/max_inotify_watches"] == derived["user/max_fanotify_marks"] == "1048576"
    assert derived["net/ipv4/tcp_max_tw_buckets"] == "262144"


def test_watermarks_are_read_and_the_lists_of_each_cpu_are_not() -> None:
    text = (
        "Node 0, zone      DMA\n  pages free     1\n        min      5\n        low      6\n        high     7\n"
        "  pagesets\n    cpu: 0\n              high:  14\n  node_unreclaimable:  0\n"
        "Node 0, zone    DMA32\n        high     300\n"
    )
    assert limits.parse_high_pages(text) == 307


@pytest.mark.parametrize(
    ("memory", "wanted"), [(100 * MIB, 1024), (256 * MIB, 2048), ((1 << 30) + 4096, 65536), (5 << 30, 262144)]
)
def test_connection_tracking(memory: int, wanted: int) -> None:
    assert limits.derive_conntrack(memory) == wanted


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A /proc/sys of our own, with the values of a boot with 256 MiB, in a guest that will have 1 GiB."""
    for key, values in BOOT_256.items():
        (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / key).write_text(" ".join(map(str, values)) + "\n")
    monkeypatch.setattr(limits, "PROC_SYS", str(tmp_path))
    monkeypatch.setattr(limits, "_raise_process_limits", lambda old, new: None)
    monkeypatch.setattr(limits, "_tmpfs_mounts", lambda: iter(()))
    monkeypatch.setattr(limits, "_set_by_parameter", lambda: {"fs/file-max"})
    monkeypatch.setattr(limits, "_total_memory", lambda: 215 * MIB)
    return tmp_path


def test_more_open_files_than_the_kernel_allows_by_itself(guest: Path) -> None:
    (guest / "fs/nr_open").write_text("1048576\n")
    limits.allow_open_files(1 << 20)
    assert (guest / "fs/nr_open").read_text() == "1048576\n"
    limits.allow_open_files(5_000_000)
    assert (guest / "fs/nr_open").read_text() == "5000000"
    with pytest.raises(RpcError, match=r"\(nofile\) to unlimited: the guest's kernel allows 2147483584 at most"):
        limits.allow_open_files((1 << 63) - 1)


def test_what_others_have_set_stays(guest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = limits.Limits()
    assert found.follow() is False
    assert (guest / "kernel/threads-max").read_text() == "1610\n", "nothing is written while the memory is the same"

    (guest / "net/ipv4/tcp_rmem").write_text("4096 87380 4194304")  # a container's sysctl
    monkeypatch.setattr(limits, "_total_memory", lambda: (215 + 768) * MIB)
    assert found.follow() is True
    grown = int((guest / "kernel/threads-max").read_text())
    assert 7500 < grown < 8000
    assert (guest / "net/ipv4/tcp_rmem").read_text() == "4096 87380 4194304"
    assert (guest / "fs/file-max").read_text() == "20170\n", "set by the kernel's command line"

    (guest / "user/max_user_namespaces").write_text("0")  # by an administrator, after the first growth
    monkeypatch.setattr(limits, "_total_memory", lambda: (215 + 1792) * MIB)
    assert found.follow() is True
    assert int((guest / "kernel/threads-max").read_text()) > 2 * grown
    assert (guest / "user/max_user_namespaces").read_text() == "0"
