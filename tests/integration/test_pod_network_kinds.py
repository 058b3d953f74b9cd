"""Networks of clones, pool machines and interfaces with a parent, several queues, rates, macvtap: a VM for each."""

import asyncio
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace
from netns_helper import Pod, inside, links, pod, qdiscs
from vm_helper import (
    INITRD,
    KERNEL,
    QEMU,
    Owned,
    busybox_rootfs,
    needs_guest_image,
    needs_vm,
    sandbox_plan,
)

from katapod.host.facts import file_identity
from katapod.host.state import StateStore
from katapod.model.network import Interworking
from katapod.plan.container_spec import ContainerOptions, ProcessDefaults, plan_container_spec
from katapod.plan.network import NetworkSettings
from katapod.rpc.pb import agent_pb2
from katapod.sandbox.container import ContainerPlan, Rootfs, create_container
from katapod.sandbox.lifecycle import Sandbox, start_sandbox
from katapod.sandbox.planning import SandboxPlan
from katapod.sandbox.pool import ready_machine
from katapod.sandbox.vmms import DEFAULT_VMM
from katapod.vmm.template import TemplateLimits, plan_template

pytestmark = [
    *needs_vm,
    needs_guest_image,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.qemu("QEMU's machines by the library"),
]

LIMITS = TemplateLimits(max_age_s=3600.0, max_uses=1000, unused_s=3600.0)


@pytest.fixture(scope="module")
def templates() -> Iterator[Path]:
    root = Path(tempfile.mkdtemp(prefix="kt-", dir="/run"))
    yield root
    shutil.rmtree(root)


@pytest.fixture
def wired() -> Iterator[Pod]:
    with pod("kinds") as made:
        made.plug("eth0", 4)
        yield made


def clone_plan(store: StateStore, sandbox_id: str, templates: Path) -> SandboxPlan:
    plan = sandbox_plan(store.layout, sandbox_id)
    identities = [file_identity(path) for path in (QEMU, KERNEL, INITRD)]
    template = plan_template(DEFAULT_VMM, plan.vm, identities, templates, LIMITS, mem_mib=256)
    return replace(plan, template=template, machine_key=template.key)


@asynccontextmanager
async def opened(store: StateStore, plan: SandboxPlan, wired: Pod) -> AsyncIterator[Sandbox]:
    """The sandbox in the pod; all is as it was when it has ended."""
    before = links(wired.netns), qdiscs(wired.netns)
    with Owned(store, plan.record.sandbox_id):
        sandbox = await start_sandbox(plan, store)
        try:
            yield sandbox
        finally:
            await sandbox.close()
        assert store.read(plan.record.sandbox_id).network is None  # nothing that a later removal would undo
    assert (links(wired.netns), qdiscs(wired.netns)) == before


async def reach(wired: Pod) -> None:
    for target in ("10.97.4.2", "fd97:0:0:4::2"):
        await asyncio.to_thread(inside, wired.peer, "ping", "-c", "2", "-W", "30", target)


async def test_a_clone_with_a_queue_for_each_vcpu(store: StateStore, templates: Path, wired: Pod) -> None:
    plan = clone_plan(store, "cloned", templates)
    plan = replace(plan, netns=wired.path, vm=replace(plan.vm, vcpus=2))
    async with opened(store, plan, wired) as sandbox:
        assert sandbox.record.template
        assert os.stat(f"/proc/{sandbox.vm.pid}/ns/net").st_ino == wired.inode
        assert sandbox.network is not None
        assert sandbox.network.nics[0].queues == 2
        await reach(wired)


async def test_a_machine_of_the_pool_gets_the_network(store: StateStore, templates: Path, wired: Pod) -> None:
    before = links(wired.netns), qdiscs(wired.netns)
    async with ready_machine(clone_plan(store, "pooled", templates), store) as ready:
        await ready.pause()
        with Owned(store, "taken"):
            plan = replace(clone_plan(store, "taken", templates), netns=wired.path)
            sandbox = await start_sandbox(plan, store, ready)
            try:
                assert sandbox.record.machine_id == "pooled"
                await reach(wired)
            finally:
                await sandbox.close()
        assert store.read(plan.record.sandbox_id).network is None  # nothing that a later removal would undo
    assert (links(wired.netns), qdiscs(wired.netns)) == before


async def test_rates_are_limited(store: StateStore, templates: Path, wired: Pod) -> None:
    settings = NetworkSettings(rx_rate=50_000_000, tx_rate=20_000_000)
    plan = replace(clone_plan(store, "shaped", templates), netns=wired.path, network=settings)
    async with opened(store, plan, wired):
        assert qdiscs(wired.netns) == ["eth0 htb", "eth0 ingress", "tap0_kata htb", "tap0_kata ingress"]
        shown = inside(wired.netns, "tc", "class", "show", "dev", "eth0").stdout
        assert "rate 20Mbit ceil 20Mbit" in shown
        await reach(wired)
        sent = inside(wired.netns, "tc", "-s", "class", "show", "dev", "eth0").stdout
        assert "Sent 0 bytes" not in sent


async def test_a_macvtap(store: StateStore, templates: Path, wired: Pod) -> None:
    settings = NetworkSettings(model=Interworking.MACVTAP)
    plan = replace(clone_plan(store, "macvtap", templates), netns=wired.path, network=settings)
    async with opened(store, plan, wired) as sandbox:
        assert qdiscs(wired.netns) == []
        answer = await sandbox.agent.call("ListInterfaces", agent_pb2.ListInterfacesRequest())
        assert "eth0" in {entry.name for entry in answer.Interfaces}
        assert not await sandbox.rescan_network()
        await reach(wired)


async def speak_tcp(sandbox: Sandbox, wired: Pod, root: Path) -> None:
    """A container asks the peer for a line, and answers it with one."""
    listens = "nc -ll -p 8080 -e echo from the pod & until grep -q ':1F90 ' /proc/net/tcp*; do sleep 0.1; done"
    script = f"{listens}; until nc -w 20 10.97.4.1 9090; do sleep 0.2; done; exec sleep 1000"
    options = ContainerOptions(args=("sh", "-c", script))
    spec = plan_container_spec(
        ProcessDefaults(env=("PATH=/bin",)), options, str(busybox_rootfs(root, "sh", "nc", "grep"))
    )
    server = await asyncio.create_subprocess_exec(
        "nsenter", f"--net={wired.path}-peer", "busybox", "nc", "-ll", "-p", "9090", "-e", "echo", "from the peer"
    )
    try:
        container = await create_container(sandbox, ContainerPlan("tcp", "busybox", spec, Rootfs(root)))
        await container.start()
        said = await sandbox.guard(sandbox.agent.read_stream("ReadStdout", "tcp", "tcp", 4096))
        assert said == b"from the peer\n"
        for address in ("10.97.4.2", "fd97:0:0:4::2"):
            done = await asyncio.to_thread(inside, wired.peer, "busybox", "nc", "-w", "20", address, "8080")
            assert done.stdout == "from the pod\n"
    finally:
        server.kill()
        await server.wait()


@pytest.mark.parametrize(
    ("kind", "mode", "model"),
    [
        ("macvlan", "bridge", Interworking.TCFILTER),
        ("macvlan", "bridge", Interworking.MACVTAP),
        ("ipvlan", "l2", Interworking.TCFILTER),
    ],
)
async def test_an_interface_with_a_parent(
    store: StateStore, templates: Path, tmp_path: Path, kind: str, mode: str, model: Interworking
) -> None:
    """The other end is beyond the parent of the pod's interface."""
    with pod("child") as wired:
        try:
            wired.plug_child(kind, mode, "eth0", 4)
        except subprocess.CalledProcessError as exc:
            if kind != "ipvlan" or "Unknown device type" not in exc.stderr:
                raise
            pytest.skip("this kernel has no ipvlan")
        plan = clone_plan(store, f"{kind}-{model.value}", templates)
        plan = replace(plan, netns=wired.path, network=NetworkSettings(model=model))
        async with opened(store, plan, wired) as sandbox:
            assert len(qdiscs(wired.netns)) == (2 if model is Interworking.TCFILTER else 0)
            await reach(wired)
            await speak_tcp(sandbox, wired, tmp_path)
