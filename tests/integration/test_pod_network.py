"""A sandbox with the network of a pod: what the guest has, what goes through it, and that it is undone."""

import asyncio
import hashlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from msgspec.structs import replace
from netns_helper import Pod, inside, ip, links, pod, qdiscs, redirected_bytes
from vm_helper import Owned, busybox_rootfs, needs_guest_image, needs_vm, sandbox_plan

from katapod.host.state import StateStore
from katapod.plan.container_spec import ContainerOptions, ProcessDefaults, plan_container_spec
from katapod.rpc.pb import agent_pb2, types_pb2
from katapod.rpc.status import RpcError, StatusCode
from katapod.sandbox.container import ContainerPlan, Rootfs, create_container
from katapod.sandbox.lifecycle import Sandbox, start_sandbox
from katapod.sandbox.recovery import find_leftovers, remove_sandbox

pytestmark = [
    *needs_vm,
    needs_guest_image,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.qemu("QEMU's machines by the library"),
]

MAC = "02:97:00:00:00:02"


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
        sandbox = await start_sandbox(plan, store)
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


@pytest.fixture(scope="module")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = busybox_rootfs(tmp_path_factory.mktemp("rootfs"), "sh", "wget", "httpd", "md5sum", "sleep", "cat")
    (root / "www").mkdir()
    (root / "www" / "data").write_bytes(os.urandom(4 << 20))
    return root


async def test_tcp_goes_both_ways(running: Sandbox, two_nics: Pod, rootfs: Path, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(os.urandom(4 << 20))
    server = await asyncio.create_subprocess_exec(
        "nsenter", f"--net={two_nics.path}-peer", sys.executable, "-m", "http.server", "8000", "--bind", "10.97.1.1",
        cwd=tmp_path, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    fetch = "until wget -q -O /tmp/data http://10.97.1.1:8000/data; do sleep 0.2; done; md5sum /tmp/data"
    script = f"httpd -p 8080 -h /www; {fetch}; exec sleep 1000"
    spec = plan_container_spec(
        ProcessDefaults(env=("PATH=/bin",)), ContainerOptions(args=("sh", "-c", script)), str(rootfs)
    )
    try:
        container = await create_container(running, ContainerPlan("tcp", "busybox", spec, Rootfs(rootfs)))
        await container.start()
        said = await running.guard(running.agent.read_stream("ReadStdout", "tcp", "tcp", 4096))
        assert said.split()[0].decode() == hashlib.md5((tmp_path / "data").read_bytes()).hexdigest()
    finally:
        server.kill()
        await server.wait()
    get = "import urllib.request, sys; sys.stdout.buffer.write(urllib.request.urlopen(sys.argv[1], timeout=60).read())"
    for host in ("10.97.1.2", "[fd97:0:0:1::2]"):
        command = ["nsenter", f"--net={two_nics.path}-peer", sys.executable, "-c", get, f"http://{host}:8080/data"]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, timeout=180, check=True)
        assert hashlib.md5(done.stdout).digest() == hashlib.md5((rootfs / "www" / "data").read_bytes()).digest()
    answer = await running.agent.call("StatsContainer", agent_pb2.StatsContainerRequest(container_id="tcp"))
    counted = {entry.name: entry for entry in answer.network_stats}
    assert counted["eth0"].rx_bytes > 4 << 20
    assert counted["eth0"].tx_bytes > 8 << 20


async def test_an_interface_comes_and_goes(running: Sandbox, two_nics: Pod) -> None:
    assert not await running.rescan_network()
    two_nics.plug("late0", 5)
    assert await running.rescan_network()
    assert running.record.network is not None
    assert [nic.interface for nic in running.record.network.nics] == ["eth0", "net1", "late0"]
    assert set(await interfaces(running)) == {"lo", "eth0", "net1", "late0"}
    await asyncio.to_thread(inside, two_nics.peer, "ping", "-c", "2", "-W", "30", "10.97.5.2")
    ip("addr", "add", "10.97.6.2/24", "dev", "late0", netns=two_nics.netns)
    ip("addr", "add", "10.97.6.1/24", "dev", "p5", netns=two_nics.peer)
    assert await running.rescan_network()
    await asyncio.to_thread(inside, two_nics.peer, "ping", "-c", "2", "-W", "30", "10.97.6.2")
    ip("link", "del", "late0", netns=two_nics.netns)
    assert await running.rescan_network()
    assert set(await interfaces(running)) == {"lo", "eth0", "net1"}
    assert links(two_nics.netns) == ["eth0", "lo", "net1", "tap0_kata", "tap1_kata"]
    await asyncio.to_thread(inside, two_nics.peer, "ping", "-c", "2", "-W", "30", "10.97.1.2")


async def test_bad_requests_are_refused(running: Sandbox) -> None:
    def interface(**fields: Any) -> agent_pb2.UpdateInterfaceRequest:
        return agent_pb2.UpdateInterfaceRequest(interface=types_pb2.Interface(**fields))

    route = types_pb2.Route
    bad: list[tuple[str, object]] = [
        ("UpdateInterface", agent_pb2.UpdateInterfaceRequest()),
        ("UpdateInterface", interface(name="eth0")),
        ("UpdateInterface", interface(name="../../etc", hwAddr=MAC)),
        ("UpdateInterface", interface(name="a" * 16, hwAddr=MAC)),
        ("UpdateInterface", interface(name="eth0", hwAddr="02:xx")),
        ("UpdateInterface", interface(name="eth0", hwAddr=MAC, devicePath="../..")),
        ("UpdateInterface", interface(name="eth0", hwAddr=MAC, mtu=1 << 40)),
        ("UpdateInterface", interface(name="eth0", hwAddr=MAC, IPAddresses=[types_pb2.IPAddress(address="1.2.3")])),
        ("UpdateRoutes", agent_pb2.UpdateRoutesRequest()),
        ("UpdateRoutes", agent_pb2.UpdateRoutesRequest(routes={"Routes": [route(device="none", dest="")]})),
        ("UpdateRoutes", agent_pb2.UpdateRoutesRequest(routes={"Routes": [route(device="eth0", dest="1.1.1.1/99")]})),
        ("AddARPNeighbors", agent_pb2.AddARPNeighborsRequest()),
    ]
    for method, request in bad:
        with pytest.raises(RpcError) as caught:
            await running.agent.call(method, request)
        assert caught.value.code is StatusCode.INVALID_ARGUMENT, method
    with pytest.raises(RpcError, match="Link not found"):
        await running.agent.call("UpdateInterface", interface(name="eth9", hwAddr="02:00:00:00:00:99"))
    with pytest.raises(RpcError) as caught:
        await running.agent.call("GetIPTables", agent_pb2.GetIPTablesRequest())
    assert caught.value.code is StatusCode.UNIMPLEMENTED
    assert set(await interfaces(running)) == {"lo", "eth0", "net1"}


OWNER = """
import asyncio, sys
from msgspec.structs import replace
from pathlib import Path
from kit.library import layout_below
from vm_helper import Owned, busybox_rootfs, sandbox_plan
from katapod.host.state import StateStore
from katapod.sandbox.container import ContainerPlan, Rootfs, create_container
from katapod.sandbox.lifecycle import start_sandbox

async def main():
    store = StateStore(layout_below(Path(sys.argv[1])))
    with Owned(store, "doomed"):
        await start_sandbox(replace(sandbox_plan(store.layout, "doomed"), netns=Path(sys.argv[2])), store)
        print("ready", flush=True)
        await asyncio.sleep(1000)

asyncio.run(main())
"""


async def test_after_a_killed_supervisor_the_record_undoes_it(store: StateStore) -> None:
    with pod("kill") as doomed:
        doomed.plug("eth0", 7)
        supervisor = await asyncio.create_subprocess_exec(
            sys.executable, "-c", OWNER, str(store.layout.state_root.parent), str(doomed.path),
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert supervisor.stdout is not None
        assert (await supervisor.stdout.readline()).strip() == b"ready"
        supervisor.kill()
        await supervisor.wait()
        assert "eth0 ingress" in qdiscs(doomed.netns)
        await remove_sandbox(store, "doomed", force=True)
        assert (qdiscs(doomed.netns), links(doomed.netns)) == ([], ["eth0", "lo"])
        assert find_leftovers(store.layout, "doomed") == []
