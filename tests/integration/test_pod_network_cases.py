"""What ip-address(8) and ip-route(8) say of a pod's network namespace holds in the guest: one VM, a case at a time."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio
from msgspec.structs import replace
from netns_helper import Pod, inside, ip, pod
from vm_helper import Owned, busybox_rootfs, needs_guest_image, needs_vm, sandbox_plan

from katapod.agent.network import list_interfaces, list_routes
from katapod.host.netns import in_netns
from katapod.host.state import StateStore
from katapod.plan.container_spec import ContainerOptions, ProcessDefaults, plan_container_spec
from katapod.rpc.pb import agent_pb2
from katapod.sandbox.container import ContainerPlan, Rootfs, create_container
from katapod.sandbox.lifecycle import Sandbox, start_sandbox

pytestmark = [
    *needs_vm,
    needs_guest_image,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.qemu("QEMU's machines by the library"),
]

DEVICES = ("eth0", "eth1")
NOPREFIXROUTE = 0x200


@dataclass(frozen=True)
class Case:
    """Lines of ip(8); then where the guest's kernel sends packets, and what of the namespace it is told it lacks."""

    lines: str
    ways: tuple[tuple[str, str], ...] = ()  # a destination, and what `ip route get` says of it
    lost: tuple[str, ...] = ()


CASES = {
    "metrics": Case(
        """
        addr add 10.9.0.2/24 dev eth0
        addr add 10.9.0.3/24 dev eth1
        route add default via 10.9.0.1 dev eth1 metric 50
        route add default via 10.9.0.1 dev eth0 metric 100
        route add 10.7.0.0/16 via 10.9.0.1 dev eth0 metric 300
        route add 10.7.0.0/16 via 10.9.0.1 dev eth1 metric 200
        """,
        (("1.1.1.1", "dev eth1"), ("10.7.0.1", "dev eth1")),
    ),
    "multipath": Case(
        """
        addr add 10.9.0.2/24 dev eth0
        addr add 10.8.0.3/24 dev eth1
        route add default nexthop via 10.9.0.1 dev eth0 weight 1 nexthop via 10.8.0.1 dev eth1 weight 2
        -6 route add fd45::/64 nexthop via fe80::5 dev eth0 nexthop via fe80::6 dev eth0 weight 3
        """
    ),
    "IPv6 metric": Case(
        """
        addr add 10.9.0.2/24 dev eth0
        -6 route add fd55::/64 dev eth0 metric 300
        -6 route add fd55::/64 via fe80::7 dev eth0 metric 200
        """,
        (("fd55::1", "via fe80::7"),),
    ),
    "peer": Case(
        """
        addr add 10.9.0.2 peer 10.9.5.5/32 dev eth0
        addr add fd00:9::2 peer fd00:9::5/128 dev eth0 nodad
        route add default via 10.9.5.5
        """,
        (("1.1.1.1", "via 10.9.5.5 dev eth0"), ("fd00:9::5", "dev eth0")),
    ),
    "types": Case(
        """
        addr add 10.9.0.2/24 dev eth0
        route add blackhole 10.66.0.0/16
        route add unreachable 10.67.0.0/16 metric 7
        route add prohibit 10.68.0.0/16
        route add throw 10.69.0.0/16
        route add 10.35.0.0/16 dev lo
        -6 route add blackhole fd66::/64
        """
    ),
    "deprecated": Case(
        """
        addr add fd00:9::2/64 dev eth0 nodad
        addr add fd00:9::3/64 dev eth0 nodad preferred_lft 0
        addr add 10.9.0.2/24 dev eth0
        addr add 10.9.0.3/24 dev eth0 preferred_lft 0
        """,
        (("fd00:9::77", "src fd00:9::2"), ("10.9.0.77", "src 10.9.0.2")),
    ),
    "order": Case(
        """
        addr add 10.9.0.2/24 dev eth0
        addr add 10.9.0.3/24 dev eth0
        addr add fd00:9::2/64 dev eth0 nodad
        addr add fd00:9::3/64 dev eth0 nodad
        """,
        (("10.9.0.77", "src 10.9.0.2"),),
    ),
    "noprefixroute": Case(
        """
        addr add 10.8.1.185/24 dev eth0 noprefixroute
        addr add fd00:9::2/64 dev eth0 nodad noprefixroute
        route add 10.8.1.1/32 dev eth0 scope link
        route add default via 10.8.1.1 dev eth0
        """,
        (("10.8.1.9", "via 10.8.1.1"),),
    ),
    "a deleted prefix route": Case(
        """
        addr add 10.8.1.185/24 dev eth0
        route del 10.8.1.0/24 dev eth0
        route add 10.8.1.1/32 dev eth0 scope link
        route add default via 10.8.1.1 dev eth0
        """,
        (("10.8.1.9", "via 10.8.1.1"),),
    ),
    "down": Case(
        """
        addr add 10.9.0.2/24 dev eth0
        addr add 10.8.0.2/24 dev eth1
        link set eth1 down
        """
    ),
    "an address and its attributes": Case(
        """
        addr add 10.9.0.2/24 brd 10.9.0.200 dev eth0 metric 77 label eth0:x
        addr add 10.9.1.9/32 dev eth0 scope link
        addr add 10.9.2.9/24 dev eth0 scope host
        """
    ),
    "a route and its attributes": Case(
        """
        addr add 10.9.0.2/24 dev eth0
        addr add 10.9.0.7/24 dev eth0
        route add 10.30.0.0/16 via inet6 fe80::1 dev eth0
        route add 10.31.0.0/16 via 10.9.0.1 tos 0x10 mtu 1300 advmss 900 initcwnd 20 rto_min 5ms features ecn quickack 1
        route add 10.32.0.0/16 via 10.200.0.1 dev eth0 onlink proto 186
        route add 10.33.0.0/16 dev eth0 src 10.9.0.7
        -6 route add fd44::/64 via fe80::5 dev eth0 pref high metric 9 hoplimit 7
        """,
        (("10.33.0.1", "src 10.9.0.7"),),
    ),
    "link flags": Case(
        """
        addr add 10.9.0.2/24 dev eth0
        link set eth0 promisc on allmulticast on multicast off arp off txqueuelen 77
        """
    ),
    "no link-local address": Case(
        """
        link set eth0 down
        link set eth0 addrgenmode none
        link set eth0 up
        addr add 10.9.0.2/24 dev eth0
        """
    ),
    "what cannot be carried": Case(
        """
        addr add 10.9.0.2/24 dev eth0
        route add 10.32.0.0/16 dev eth0 table 100
        route add local 10.37.0.0/16 dev lo
        """,
        lost=("the routes of table 100", "the routes of table local"),
    ),
}


LOST = "the guest does not get {} of its network namespace: it cannot be carried"


@pytest.fixture(scope="module")
def wired() -> Iterator[Pod]:
    with pod("cases") as made:
        for number, name in enumerate(DEVICES):
            made.plug(name, number + 1)
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(store: StateStore, wired: Pod, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Sandbox]:
    rootfs = busybox_rootfs(tmp_path_factory.mktemp("rootfs"), "sleep", "ip")
    with Owned(store, "cases"):
        sandbox = await start_sandbox(replace(sandbox_plan(store.layout, "cases"), netns=wired.path), store)
        try:
            options = ContainerOptions(args=("sleep", "1000"))
            spec = plan_container_spec(ProcessDefaults(env=("PATH=/bin",)), options, str(rootfs))
            container = await create_container(sandbox, ContainerPlan("ways", "busybox", spec, Rootfs(rootfs)))
            await container.start()
            yield sandbox
        finally:
            await sandbox.close()


def arrange(wired: Pod, case: Case) -> None:
    """From the same start, whatever the case before it was."""
    reset = []
    for name in DEVICES:
        reset += [f"link set {name} down", f"addr flush dev {name}", f"link set {name} addrgenmode eui64"]
        reset += [f"link set {name} promisc off allmulticast off multicast on arp on txqueuelen 1000"]
    for line in [*reset, *(f"link set {name} up" for name in DEVICES)]:
        ip(*line.split(), netns=wired.netns)
    for table in ("main", "100"):
        inside(wired.netns, "ip", "route", "flush", "table", table, check=False)
        inside(wired.netns, "ip", "-6", "route", "flush", "table", table, "proto", "boot", check=False)
    inside(wired.netns, "ip", "route", "flush", "table", "local", "proto", "boot", check=False)
    for line in case.lines.strip().splitlines():
        ip(*line.split(), netns=wired.netns)


def described(interfaces: agent_pb2.Interfaces, routes: agent_pb2.Routes) -> list[str]:
    """Both sides in the same words: the pod's interfaces, and the routes that lead by them or by none."""
    lines, names = [], set()
    for entry in interfaces.Interfaces:
        if entry.name in DEVICES and any(not address.address.startswith("fe80:") for address in entry.IPAddresses):
            names.add(entry.name)
            for number, address in enumerate(entry.IPAddresses):
                address.flags &= ~NOPREFIXROUTE  # what it does is seen by the routes; it also stands in for a deletion
                lines.append(f"{entry.name} {number}: {in_a_line(address)}")
            entry.raw_flags = 0  # RUNNING and the like
            del entry.IPAddresses[:]
            lines.append(in_a_line(entry))
    ways = [route for route in routes.Routes if route.device not in ("tap0_kata", "tap1_kata")]
    ways = [route for route in ways if not route.device.startswith("eth") or route.device in names]
    return sorted(lines) + sorted(in_a_line(route) for route in ways)


def in_a_line(message: object) -> str:
    return " ".join(str(message).split())


async def of_namespace(wired: Pod) -> list[str]:
    def look() -> list[str]:
        agent: Any = None  # neither asks it for anything
        interfaces = asyncio.run(list_interfaces(agent, agent_pb2.ListInterfacesRequest()))
        return described(interfaces, asyncio.run(list_routes(agent, agent_pb2.ListRoutesRequest())))

    return await asyncio.to_thread(in_netns, wired.path, look)


async def of_guest(sandbox: Sandbox) -> list[str]:
    return described(
        await sandbox.agent.call("ListInterfaces", agent_pb2.ListInterfacesRequest()),
        await sandbox.agent.call("ListRoutes", agent_pb2.ListRoutesRequest()),
    )


@pytest.mark.parametrize("name", CASES)
async def test_it_holds_in_the_guest(running: Sandbox, wired: Pod, name: str, caplog: pytest.LogCaptureFixture) -> None:
    case = CASES[name]
    await asyncio.to_thread(arrange, wired, case)
    with caplog.at_level(logging.WARNING):
        assert await running.rescan_network()
    inside_guest, wanted = await of_guest(running), await of_namespace(wired)
    assert [line for line in inside_guest if line not in wanted] == [], "\n".join(wanted)
    assert inside_guest == wanted
    for destination, way in case.ways:
        assert way in " ".join((await ask_way(running, destination)).split())
    said = [record.getMessage() for record in caplog.records]
    assert [text for text in said if "cannot be carried" in text] == [LOST.format(what) for what in case.lost]


async def ask_way(sandbox: Sandbox, destination: str) -> str:
    family = "-6" if ":" in destination else "-4"
    exec_id = f"way-{os.urandom(4).hex()}"
    request = agent_pb2.ExecProcessRequest(container_id="ways", exec_id=exec_id)
    request.process.Args.extend(("ip", family, "route", "get", destination))
    request.process.Env.append("PATH=/bin")
    request.process.Cwd = "/"
    await sandbox.agent.call("ExecProcess", request)
    said = await sandbox.guard(sandbox.agent.read_stream("ReadStdout", "ways", exec_id, 4096))
    await sandbox.agent.call("WaitProcess", agent_pb2.WaitProcessRequest(container_id="ways", exec_id=exec_id))
    return said.decode()
