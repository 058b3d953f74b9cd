"""Which cgroups a sandbox gets, in both versions."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from katapod.model.errors import SpecError
from katapod.plan.cgroup import (
    CgroupPlan,
    Hierarchy,
    parent_of_sandbox,
    parse_hierarchies,
    path_without_engine,
    plan_cgroup,
    plan_vmm_cgroup,
)

ROOT = Path("/sys/fs/cgroup")
MEMORY = Hierarchy(ROOT / "memory", 1, frozenset({"memory"}))
CPU = Hierarchy(ROOT / "cpu,cpuacct", 1, frozenset({"cpu", "cpuacct"}))
CPUSET = Hierarchy(ROOT / "cpuset", 1, frozenset({"cpuset"}))
V2 = Hierarchy(ROOT, 2, frozenset({"cpu", "memory", "pids"}))
BESIDE = Hierarchy(ROOT / "unified", 2, frozenset())
POD = "/kubepods/burstable/pod7/c1"
KATA = "/kubepods/burstable/pod7/kata_s1"
CPUSET_VALUES = "cpuset.cpus=as the parent cpuset.mems=as the parent"


def plan(*hierarchies: Hierarchy, only: bool, path: str = POD) -> CgroupPlan:
    found = plan_cgroup("s1", path, hierarchies, sandbox_cgroup_only=only, mem_mib=256, beside_mib=128)
    assert found is not None
    return found


def test_v1_all_in_the_pods_cgroup() -> None:
    found = plan(MEMORY, CPU, CPUSET, BESIDE, only=True)
    assert found.describe().splitlines() == [
        f"cgroup v1 /sys/fs/cgroup/memory{KATA}: supervisor, QEMU, virtiofsd; memory.limit_in_bytes={384 << 20}",
        "cgroup v1 /sys/fs/cgroup/cpu,cpuacct/kubepods/burstable/pod7/kata_s1: supervisor, QEMU, virtiofsd;",
        f"cgroup v1 /sys/fs/cgroup/cpuset{KATA}: supervisor, QEMU, virtiofsd; " + CPUSET_VALUES,
    ]


def test_v1_only_the_vcpus_in_the_pods_cgroup() -> None:
    found = plan(MEMORY, CPU, only=False)
    assert found.describe().splitlines() == [
        "cgroup v1 /sys/fs/cgroup/memory/kata_overhead/s1: supervisor, QEMU, virtiofsd;",
        "cgroup v1 /sys/fs/cgroup/cpu,cpuacct/kata_overhead/s1: supervisor, QEMU, virtiofsd;",
        "cgroup v1 /sys/fs/cgroup/cpu,cpuacct/kubepods/burstable/pod7/kata_s1: vCPU threads;",
    ]


@pytest.mark.parametrize(("hierarchy", "file"), [(MEMORY, "memory.limit_in_bytes"), (V2, "memory.max")])
def test_a_limit_where_the_pod_has_none(hierarchy: Hierarchy, file: str) -> None:
    hierarchies = (hierarchy, CPU) if hierarchy is MEMORY else (hierarchy,)
    found = plan_cgroup("s1", POD, hierarchies, sandbox_cgroup_only=False, mem_mib=256, beside_mib=384, limited=True)
    assert found is not None
    limits = {group.directory: group.limit_file for group in found.groups if group.limit_file}
    assert limits == {hierarchy.mount / "kata_overhead/s1": file}
    assert found.holds_supervisor


@pytest.mark.parametrize(("hierarchy", "file"), [(MEMORY, "memory.limit_in_bytes"), (V2, "memory.max")])
def test_a_limit_for_the_vmm_alone(hierarchy: Hierarchy, file: str) -> None:
    found = plan_vmm_cgroup("s1", (CPU, BESIDE, hierarchy), mem_mib=256, beside_mib=384)
    assert found is not None
    assert not found.holds_supervisor
    version = hierarchy.version
    assert found.describe() == f"cgroup v{version} {hierarchy.mount}/vc/kata_s1: the VMM; {file}={640 << 20}"


def test_without_a_hierarchy_for_memory_there_is_no_limit() -> None:
    assert plan_vmm_cgroup("s1", (CPU, BESIDE), mem_mib=256, beside_mib=384) is None


def test_v2() -> None:
    assert plan(V2, only=True).describe() == (
        f"cgroup v2 /sys/fs/cgroup/kubepods/burstable/pod7/kata_s1: supervisor, QEMU, virtiofsd; memory.max={384 << 20}"
    )
    assert plan(V2, only=False).describe() == (
        "cgroup v2 /sys/fs/cgroup/kata_overhead/s1: supervisor, QEMU, virtiofsd;"
    )


def test_a_host_without_cgroups_gets_none() -> None:
    assert plan_cgroup("s1", POD, (), sandbox_cgroup_only=True, mem_mib=1, beside_mib=1) is None


def test_only_parents_that_are_not_there_are_removed_with_the_sandbox_the_deepest_first() -> None:
    found = plan(MEMORY, only=True, path="/default/a/c1").without(frozenset())
    base = "/sys/fs/cgroup/memory/default"
    assert found.directories == (f"{base}/a/kata_s1", f"{base}/a", base)
    assert found.without(frozenset({Path(base)})).directories == (f"{base}/a/kata_s1", f"{base}/a")


def test_the_last_sandbox_removes_what_all_share_whoever_made_it() -> None:
    shared = ROOT / "memory" / "kata_overhead"
    found = plan(MEMORY, only=False).without(frozenset({shared}))
    assert found.directories == (str(shared / "s1"), str(shared))
    shared = ROOT / "memory" / "vc"
    found = plan(MEMORY, only=True, path=path_without_engine("s1")).without(frozenset({shared}))
    assert found.directories == (str(shared / "kata_s1"), str(shared))


@pytest.mark.parametrize(
    ("path", "wanted"),
    [("", "/vc/s1"), ("mine/c1", "/vc/mine/c1"), ("/own/c1", "/own/c1"), ("a.slice:kata:c1", "a.slice:kata:c1")],
)
def test_a_place_without_an_engine(path: str, wanted: str) -> None:
    assert path_without_engine("s1", path) == wanted


def test_the_limit_follows_the_guest() -> None:
    assert plan(MEMORY, only=True).limit_bytes(1024) == 1152 << 20


@pytest.mark.parametrize(
    ("path", "parent"),
    [
        ("", "/"),
        ("/", "/"),
        ("c1", "/"),
        ("/default/c1", "/default"),
        ("default/c1", "/default"),
        (POD, "/kubepods/burstable/pod7"),
        ("/a:b/c:d:e", "/a:b"),
        ("system.slice:cri-containerd:c1", "/system.slice"),
        (":cri-containerd:c1", "/system.slice"),
        ("-.slice:x:c1", "/"),
        (
            "kubepods-burstable-pod7_1.slice:cri-containerd:c1",
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod7_1.slice",
        ),
    ],
)
def test_parent(path: str, parent: str) -> None:
    assert parent_of_sandbox(path) == parent


@pytest.mark.parametrize("path", ["/a/../../etc/x", "..", "kubepods:x:c1", "a--b.slice:x:c1", "/a\0b/c", "..:x:c1"])
def test_paths_that_are_refused(path: str) -> None:
    with pytest.raises(SpecError, match="cannot use linux"):
        parent_of_sandbox(path)


@given(st.text(alphabet="ab/.:-\0", max_size=30) | st.text(max_size=30))
def test_no_path_leads_out(path: str) -> None:
    try:
        parent = parent_of_sandbox(path)
    except SpecError:
        return
    assert parent.startswith("/")
    assert ".." not in parent.split("/")


MOUNTINFO = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
36 31 0:32 / /mnt/memory rw,relatime - cgroup cgroup rw,memory
37 31 0:36 / /sys/fs/cgroup/devices rw,relatime - cgroup cgroup rw,devices
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
42 31 0:39 /below /mnt/part rw,relatime - cgroup cgroup rw,pids
broken line
"""


def test_hierarchies_of_a_host() -> None:
    found = parse_hierarchies(MOUNTINFO, {ROOT / "unified": "hugetlb memory\n"})
    assert [(str(each.mount), each.version, sorted(each.controllers)) for each in found] == [
        ("/sys/fs/cgroup/cpu,cpuacct", 1, ["cpu", "cpuacct"]),
        ("/sys/fs/cgroup/memory", 1, ["memory"]),
        ("/sys/fs/cgroup/devices", 1, []),
        ("/sys/fs/cgroup/systemd", 1, []),
        ("/sys/fs/cgroup/unified", 2, ["memory"]),
    ]
