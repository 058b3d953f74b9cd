"""What comes to a sandbox of User-mode Linux, and goes, while its guest runs."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from netns_helper import Pod, inside, ip, links, pod, qdiscs

from katapod.host.facts import collect_host_facts, virtiofsd_implementation
from katapod.host.state import StateStore
from katapod.images import ImageStore
from katapod.model.config import Config, check_paths, load_config
from katapod.model.errors import KatapodError
from katapod.model.ids import ContainerId
from katapod.model.layout import Layout
from katapod.model.record import SandboxRecord
from katapod.model.sizing import ContainerLimits
from katapod.plan.container_spec import ContainerOptions, ProcessDefaults, plan_container_spec
from katapod.rpc.pb import agent_pb2, types_pb2
from katapod.rpc.status import RpcError
from katapod.sandbox.container import ContainerPlan, Rootfs, create_container
from katapod.sandbox.lifecycle import Sandbox, start_sandbox
from katapod.sandbox.opening import claimed
from katapod.sandbox.planning import plan_sandbox, size_for
from katapod.sandbox.recovery import remove_sandbox
from katapod.vmm.spec import Accelerator
from katapod.vmm.uml.disk_server import has_disk_server
from katapod.vmm.uml.vmm import Uml
from kit.kata import RUN_PREFIX
from kit.sinks import Kept

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.usefixtures("guest_image"),
    pytest.mark.skipif(not Uml().guest(Config())[1].exists(), reason="needs a guest image for User-mode Linux"),
    pytest.mark.skipif(not has_disk_server(), reason="needs the package qemu-utils"),
]

NAME = f"{RUN_PREFIX}umlplug"
MEM_MIB = 512


@pytest.fixture(scope="module")
def network() -> Iterator[Pod]:
    with pod("umlplug") as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sandbox(network: Pod) -> AsyncIterator[Sandbox]:
    """One without an interface yet, and without a disk."""
    layout = Layout()
    store, facts, config = StateStore(layout), collect_host_facts(), check_paths(load_config(None), os.path.exists)
    record = SandboxRecord(NAME, created_at=time.time(), supervisor_pid=os.getpid(), boot_id=facts.boot_id)
    async with claimed(store, record):
        plan = plan_sandbox(
            record,
            config,
            facts,
            layout,
            accelerator=Accelerator.UML,
            implementation=await virtiofsd_implementation(config.qemu.virtio_fs_daemon),
            size=size_for(config, facts, (ContainerLimits(memory_bytes=(MEM_MIB - 192) << 20),)),
            hostname="umlplug",
            shm_size_bytes=16 << 20,
            netns=network.path,
        )
        running = await start_sandbox(plan, store)
        try:
            yield running
        finally:
            await running.close()
            await remove_sandbox(store, NAME)
    assert (links(network.netns), qdiscs(network.netns)) == (["lo"], [])


async def output_of(sandbox: Sandbox, container_id: str, script: str, **options: Any) -> str:
    """Of a container that comes, with a root disk of its own, and goes."""
    images = ImageStore(sandbox.store.layout.image_root)
    busybox = await images.acquire("busybox", ContainerId(sandbox.sandbox_id))
    root = images.rootfs_path(busybox.digest)
    chosen = ContainerOptions(args=("sh", "-c", script), **options)
    spec = plan_container_spec(ProcessDefaults(env=busybox.config.env), chosen, str(root))
    rootfs = Rootfs(root, disk=await images.root_disk(busybox))
    container = await create_container(
        sandbox, ContainerPlan(container_id=container_id, image="busybox", spec=spec, rootfs=rootfs)
    )
    await container.start()
    said = Kept()
    async with asyncio.timeout(180):
        assert await container.carry(None, said, said) == 0, said.data
    assert sandbox.devices.table.disks
    await container.remove()
    return said.data.decode()


async def interfaces(sandbox: Sandbox) -> dict[str, types_pb2.Interface]:
    answer = await sandbox.agent.call("ListInterfaces", agent_pb2.ListInterfacesRequest())
    return {entry.name: entry for entry in answer.Interfaces}


async def reached(network: Pod, *addresses: str) -> None:
    for address in addresses:
        await asyncio.to_thread(inside, network.peer, "ping", "-c", "1", "-W", "30", address)


async def test_interfaces_come_and_go_and_come_again(sandbox: Sandbox, network: Pod) -> None:
    assert not await sandbox.rescan_network()
    network.plug("net0", 1, mtu=9000, mac="52:54:00:aa:00:01")
    network.plug("net1", 2)
    assert await sandbox.rescan_network()
    there = await interfaces(sandbox)
    assert (set(there), there["net0"].mtu, there["net0"].hwAddr) == ({"lo", "net0", "net1"}, 9000, "52:54:00:aa:00:01")
    await reached(network, "10.97.1.2", "fd97:0:0:1::2", "10.97.2.2")
    assert [(nic.interface, nic.guest_path) for nic in sandbox.devices.table.nics] == [("net0", ""), ("net1", "")]
    ip("link", "del", "net0", netns=network.netns)
    assert await sandbox.rescan_network()
    assert set(await interfaces(sandbox)) == {"lo", "net1"}
    assert [nic.interface for nic in sandbox.devices.table.nics] == ["net1"]
    network.plug("net2", 3)  # in the place of net0
    assert await sandbox.rescan_network()
    assert set(await interfaces(sandbox)) == {"lo", "net1", "net2"}
    await reached(network, "10.97.2.2", "10.97.3.2")
    for name in ("net1", "net2"):
        ip("link", "del", name, netns=network.netns)
    assert await sandbox.rescan_network()
    assert (set(await interfaces(sandbox)), sandbox.devices.table.nics) == ({"lo"}, ())


async def test_root_disks_come_and_go_with_their_containers(sandbox: Sandbox) -> None:
    script = "grep -o '^/dev/vd[a-z]' /proc/mounts | sort -u; echo x > /made; ls /made"
    for _ in range(3):
        assert await output_of(sandbox, "one", script) == "/dev/vda\n/made\n"
        assert sandbox.devices.table.disks == ()
    found = await asyncio.gather(*(output_of(sandbox, name, f"{script}; sleep 1") for name in ("two", "three")))
    assert sorted(found) == ["/dev/vda\n/made\n", "/dev/vdb\n/made\n"]


async def test_a_disk_that_is_refused_leaves_nothing(sandbox: Sandbox, tmp_path: Path) -> None:
    with pytest.raises(KatapodError, match="cannot attach disk bad: qemu-storage-daemon ended unexpectedly"):
        await sandbox.add_disk("bad", tmp_path, read_only=False)
    assert sandbox.devices.table.disks == ()
    assert await output_of(sandbox, "after", "echo lives") == "lives\n"


async def test_the_agent_lets_go_of_what_it_has_only(sandbox: Sandbox) -> None:
    for request, said in (
        ({}, "names no device"),
        ({"disk": "../../x"}, "cannot let go of the disk"),
        ({"mac": "x"}, "cannot read the MAC address"),
    ):
        with pytest.raises(RpcError, match=said):
            await sandbox.agent.let_go(**request)
    await sandbox.agent.let_go(disk="virtio-uml.7")  # nothing is there
    await sandbox.agent.let_go(mac="52:54:00:00:00:77")


async def test_what_is_beyond_its_size_is_refused_with_the_sizes(sandbox: Sandbox) -> None:
    await sandbox.resize(vcpus=1, mem_mib=MEM_MIB)
    with pytest.raises(
        KatapodError, match=f"cannot plug 512 MiB beside the {MEM_MIB} of the sandbox: this VMM adds no"
    ):
        await sandbox.resize(vcpus=1, mem_mib=2 * MEM_MIB)
    with pytest.raises(KatapodError, match="cannot add 1 vCPUs to the 1 of the sandbox: this VMM adds none"):
        await sandbox.resize(vcpus=2, mem_mib=MEM_MIB)
    assert (sandbox.guest_mem_mib, sandbox.guest_vcpus) == (MEM_MIB, 1)
