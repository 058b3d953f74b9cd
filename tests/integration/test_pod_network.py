"""A sandbox with the network of a pod: what the guest has, what goes through it, and that it is undone."""

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
from netns_helper import Pod, inside, ip, links, pod, qdiscs, redirected_bytes
from vm_helper import Owned, layout_below, needs_guest_image, needs_vm, sandbox_plan

from katapod.host.mounts import remove_tree
from katapod.host.state import StateStore
from katapod.rpc.pb import agent_pb2, types_pb2
from katapod.sandbox.lifecycle import Sandbox, open_sandbox

pytestmark = [*needs_vm, needs_guest_image, pytest.mark.asyncio(loop_scope="module")]

MAC = "02:97:00:00:00:02"


@pytest.fixture(scope="module")
def store() -> Iterator[StateStore]:
    root = Path(tempfile.mkdtemp(prefix="kt-", dir="/run"))  # short: socket paths have 107 bytes
    yield StateStore(layout_below(root))
    remove_tree(root)


@pytest.fixture(scope="module")
def two_nics() -> Iterator[Pod]:
    with pod("two") as made:
        made.plug("eth0", 1, mtu=9000, mac=MAC)
        made.plug("net1", 2)
        ip("route", "add", "default", "via", "10.97.1.1", netns=made.netns)
        ip(
            "route",
            "add",
            "10.98.0.0/16",
            "via",
            "10.200.0.1",
            "dev",
            "net1",
            "onlink",
            "mtu",
            "1400",
            netns=made.netns,
        )
        ip("-6", "route", "add", "default", "via", "fd97:0:0:1::1", netns=made.netns)
        ip("neigh", "add", "10.97.1.77", "lladdr", "02:00:00:00:00:77", "dev", "eth0", netns=made.netns)
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(store: StateStore, two_nics: Pod) -> AsyncIterator[Sandbox]:
    with Owned(store, "net") as owned:
        before = links(two_nics.netns), qdiscs(two_nics.netns)
        plan = replace(sandbox_plan(store.layout, "net"), netns=two_nics.path)
        sandbox = await open_sandbox(plan, store)
        try:
            yield sandbox
        finally:
            await sandbox.close()
        assert owned.left() == []
        assert (links(two_nics.netns), qdiscs(two_nics.netns)) == before


async def interfaces(sandbox: Sandbox) -> dict[str, types_pb2.Interface]:
    answer = await sandbox.agent.call("ListInterfaces", agent_pb2.ListInterfacesRequest())
    return {entry.name: entry for entry in answer.Interfaces}


async def test_the_guest_has_the_pods_interfaces(running: Sandbox, two_nics: Pod) -> None:
    assert os.stat(f"/proc/{running.vm.pid}/ns/net").st_ino == two_nics.inode
    found = await interfaces(running)
    assert set(found) == {"lo", "eth0", "net1"}
    assert (found["eth0"].hwAddr, found["eth0"].mtu) == (MAC, 9000)
    assert found["net1"].mtu == 1500
    addresses = {f"{entry.address}/{entry.mask}" for entry in found["eth0"].IPAddresses}
    assert {"10.97.1.2/24", "fd97:0:0:1::2/64"} <= addresses
    assert any(entry.address.startswith("fe80:") for entry in found["eth0"].IPAddresses)


async def test_the_guest_has_the_pods_routes(running: Sandbox) -> None:
    answer = await running.agent.call("ListRoutes", agent_pb2.ListRoutesRequest())
    routes = {
        (route.dest, route.family, route.gateway, route.device, route.mtu, route.flags) for route in answer.Routes
    }
    assert ("", types_pb2.v4, "10.97.1.1", "eth0", 0, 0) in routes
    assert ("10.98.0.0/16", types_pb2.v4, "10.200.0.1", "net1", 1400, 4) in routes
    assert ("", types_pb2.v6, "fd97:0:0:1::1", "eth0", 0, 0) in routes


async def test_frames_go_both_ways(running: Sandbox, two_nics: Pod) -> None:
    before = [redirected_bytes(two_nics.netns, device) for device in ("eth0", "tap0_kata")]
    for target in ("10.97.1.2", "fd97:0:0:1::2", "10.97.2.2"):
        await asyncio.to_thread(inside, two_nics.peer, "ping", "-c", "3", "-W", "30", target)
    await asyncio.to_thread(inside, two_nics.peer, "ping", "-c", "2", "-W", "30", "-M", "do", "-s", "8900", "10.97.1.2")
    after = [redirected_bytes(two_nics.netns, device) for device in ("eth0", "tap0_kata")]
    assert all(new > old for old, new in zip(before, after, strict=True))
    assert qdiscs(two_nics.netns) == [f"{name} ingress" for name in ("eth0", "net1", "tap0_kata", "tap1_kata")]
