"""Cgroups of this host, made for a sandbox: joined, limited, removed, also by another process."""

import asyncio
import errno
import logging
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace
from vm_helper import Owned, needs_guest_image, needs_vm, sandbox_plan, threads_of

from katapod.host.cgroup import (
    host_cgroup_version,
    host_hierarchies,
    joined_cgroup,
    prepare_cgroup,
    remove_cgroups,
)
from katapod.host.process import run
from katapod.host.state import StateStore
from katapod.plan.cgroup import CgroupPlan, Hierarchy, plan_cgroup
from katapod.sandbox.lifecycle import start_sandbox
from katapod.sandbox.planning import SandboxPlan
from katapod.sandbox.recovery import remove_sandbox
from kit.library import layout_below

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]


def memory_hierarchy() -> Hierarchy:
    found = [each for each in host_hierarchies() if "memory" in each.controllers]
    if not found:
        pytest.skip("this host has no memory controller for us")
    return found[0]


@pytest.fixture
def pod() -> Iterator[str]:
    """A cgroup path of our own, as an engine gives it; its parent is there, as the kubelet's is."""
    name = f"/katapod-test-{uuid.uuid4().hex[:8]}"
    made = []
    for hierarchy in host_hierarchies():
        if hierarchy.controllers:
            made.append(hierarchy.mount / name[1:])
            made[-1].mkdir()
    yield f"{name}/c1"
    for directory in made:
        assert [each.name for each in directory.iterdir() if each.is_dir()] == []
        directory.rmdir()


def prepared(pod: str, *, only: bool = True, sandbox_id: str = "s1") -> CgroupPlan:
    found = prepare_cgroup(sandbox_id, pod, sandbox_cgroup_only=only, mem_mib=256, beside_mib=256)
    assert found is not None
    return found


def membership(pid: int | str = "self") -> set[str]:
    return set(Path(f"/proc/{pid}/cgroup").read_text().splitlines())


async def test_children_are_in_the_cgroup_and_we_come_back(pod: str) -> None:
    before = membership()
    plan = prepared(pod)
    async with joined_cgroup(plan) as cgroup:
        assert cgroup is not None
        child = (await run(["cat", "/proc/self/cgroup"])).stdout
        memory = memory_hierarchy()
        ours = next(group for group in plan.groups if group.hierarchy == memory)
        assert f"{pod.rpartition('/')[0]}/kata_s1" in child
        assert child.count("/kata_s1\n") == len(plan.groups)
        assert (ours.directory / ours.limit_file).read_text().strip() == str(512 << 20)
        cgroup.allow(512)
        assert (ours.directory / ours.limit_file).read_text().strip() == str(768 << 20)
    assert membership() == before
    assert not any(Path(name).exists() for name in plan.directories)


async def test_parents_that_we_made_go_and_others_stay(pod: str) -> None:
    parent = pod.rpartition("/")[0]
    plan = prepared(f"{parent}/a/b/c1")
    async with joined_cgroup(plan):
        assert all(Path(name).exists() for name in plan.directories)
    assert not any(Path(name).exists() for name in plan.directories)
    assert (memory_hierarchy().mount / parent[1:]).is_dir()


async def test_a_lower_limit_of_the_pod_is_told_with_both_numbers(pod: str, caplog: pytest.LogCaptureFixture) -> None:
    plan = prepared(pod)
    limited = next(group for group in plan.groups if group.limit_file)
    (limited.directory.parent / limited.limit_file).write_text(str(320 << 20))
    with caplog.at_level(logging.WARNING):
        async with joined_cgroup(plan):
            pass
    assert "allows 320 MiB" in caplog.text
    assert "use 512 MiB" in caplog.text


async def test_a_limit_that_is_enough_is_not_worth_a_word(pod: str, caplog: pytest.LogCaptureFixture) -> None:
    async with joined_cgroup(prepared(pod)):
        pass
    assert "allows" not in caplog.text


def test_from_disk_alone_with_a_process_left_in_it(pod: str) -> None:
    plan = prepared(pod)
    hierarchy = memory_hierarchy()
    group = next(group for group in plan.groups if group.hierarchy == hierarchy)
    group.directory.mkdir()
    child = subprocess.Popen(["sleep", "600"])
    (group.directory / "cgroup.procs").write_text(str(child.pid))
    assert remove_cgroups(plan.directories) == []
    assert child.wait() == -signal.SIGKILL
    assert not any(Path(name).exists() for name in plan.directories)


async def test_what_cannot_be_removed_is_named(pod: str) -> None:
    plan = prepared(pod)
    async with joined_cgroup(plan):
        left = await asyncio.to_thread(remove_cgroups, plan.directories, 0.1)  # we are in it ourselves
        assert len(left) == len(plan.groups)
        assert os.strerror(errno.EBUSY) in left[0]


async def test_where_no_cgroup_can_be_made_the_sandbox_runs_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    proc = Hierarchy(Path("/proc/sys"), 1, frozenset({"memory"}))  # takes no directory, not even root's
    plan = plan_cgroup("s1", "/p/c1", (proc,), sandbox_cgroup_only=True, mem_mib=256, beside_mib=128)
    async with joined_cgroup(plan) as cgroup:
        assert cgroup is None
    assert "runs without the cgroup /proc/sys/p/kata_s1" in caplog.text


async def test_v2_alone(pod: str) -> None:
    """On the v2 hierarchy of this host, whichever controllers it has."""
    v2 = [each for each in host_hierarchies() if each.version == 2]
    if not v2:
        pytest.skip("this host has no cgroup v2")
    before = membership()
    path = f"/katapod-test-{uuid.uuid4().hex[:8]}/c1"
    plan = plan_cgroup("s1", path, (v2[0],), sandbox_cgroup_only=True, mem_mib=256, beside_mib=128)
    assert plan is not None
    plan = plan.without(frozenset())
    async with joined_cgroup(plan) as cgroup:
        assert cgroup is not None
        assert f"0::{path.rpartition('/')[0]}/kata_s1" in membership()
    assert membership() == before
    assert not any(Path(name).exists() for name in plan.directories)


def test_version() -> None:
    assert host_cgroup_version() == (2 if Path("/sys/fs/cgroup/cgroup.procs").exists() else 1)


def with_cgroup(plan: SandboxPlan, cgroup: CgroupPlan) -> SandboxPlan:
    return replace(plan, cgroup=cgroup, record=msgspec.structs.replace(plan.record, cgroups=cgroup.directories))


@needs_guest_image
@pytest.mark.skipif(any(mark.args[0] for mark in needs_vm), reason="needs QEMU and virtiofsd")
@pytest.mark.parametrize("only", [True, False])
async def test_a_machine_in_its_cgroups(pod: str, only: bool) -> None:
    sandbox_id = f"cg-{uuid.uuid4().hex[:8]}"
    with tempfile.TemporaryDirectory(prefix="kp") as root:
        store = StateStore(layout_below(Path(root)))
        plan = with_cgroup(sandbox_plan(store.layout, sandbox_id), prepared(pod, only=only, sandbox_id=sandbox_id))
        before = membership()
        with Owned(store, sandbox_id):
            sandbox = await start_sandbox(plan, store)
            try:
                assert plan.cgroup is not None
                assert store.read(sandbox_id).cgroups == plan.cgroup.directories
                inside = f"{pod.rpartition('/')[0]}/kata_{sandbox_id}"
                process_group = inside if only else f"/kata_overhead/{sandbox_id}"
                for pid in (os.getpid(), sandbox.vm.pid, sandbox.share.pid or 0):
                    found = [line for line in membership(pid) if line.endswith(process_group)]
                    assert len(found) == sum(group.processes for group in plan.cgroup.groups)
                await sandbox.resize(vcpus=2, mem_mib=512)
                if only:
                    limited = next(group for group in plan.cgroup.groups if group.limit_file)
                    limit = int((limited.directory / limited.limit_file).read_text())
                    assert limit == (512 + plan.cgroup.beside_mib) << 20
                elif host_cgroup_version() == 1:
                    threads = await sandbox.vm.vcpu_threads()
                    assert len(threads) == threads_of(2, sandbox.vm.pid)
                    for thread in threads:
                        lines = membership(f"{sandbox.vm.pid}/task/{thread}")
                        assert any(line.endswith(inside) and ":cpu" in line for line in lines)
            finally:
                await sandbox.close()
            assert membership() == before
            # /kata_overhead itself is every sandbox's, those of other tests included
            own = [Path(name) for name in plan.cgroup.directories if not name.endswith("/kata_overhead")]
            assert not any(directory.exists() for directory in own)
        await remove_sandbox(store, sandbox_id)


OWNER = """
import asyncio, os, sys
from pathlib import Path
from katapod.host.state import StateStore
from test_cgroup import with_cgroup, prepared
from kit.library import layout_below
from vm_helper import sandbox_plan
from katapod.sandbox.lifecycle import start_sandbox

async def main() -> None:
    root, sandbox_id, pod = sys.argv[1:]
    store = StateStore(layout_below(Path(root)))
    plan = with_cgroup(sandbox_plan(store.layout, sandbox_id), prepared(pod, sandbox_id=sandbox_id))
    lock = store.create(plan.record)
    await start_sandbox(plan, store)
    print("runs", flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@needs_guest_image
@pytest.mark.skipif(any(mark.args[0] for mark in needs_vm), reason="needs QEMU and virtiofsd")
async def test_after_the_supervisor_was_killed(pod: str) -> None:
    sandbox_id = f"cg-{uuid.uuid4().hex[:8]}"
    with tempfile.TemporaryDirectory(prefix="kp") as root:
        supervisor = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            OWNER,
            root,
            sandbox_id,
            pod,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        try:
            assert supervisor.stdout is not None
            assert await supervisor.stdout.readline() == b"runs\n"
            directories = StateStore(layout_below(Path(root))).read(sandbox_id).cgroups
            assert directories
            assert all(Path(name).exists() for name in directories)
        finally:
            supervisor.kill()
            await supervisor.wait()
        await remove_sandbox(StateStore(layout_below(Path(root))), sandbox_id)
        assert not any(Path(name).exists() for name in directories)
