"""Network interfaces of a real kernel of User-mode Linux: frames, addresses, limits, plugging, its end."""

import hashlib
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from msgspec.structs import replace
from netns_helper import Pod, inside, ip, links, pod, qdiscs
from tiny_guest_helper import IPV6, NOBODY, tiny_guest

from katapod.model.network import NetworkRecord
from katapod.plan.network import NetworkSettings, NicPlan
from katapod.sandbox.network import PodNetwork, attach_network
from katapod.sandbox.release import ReleaseStack
from katapod.vmm.devices import Nic
from katapod.vmm.uml.mconsole import Mconsole
from katapod.vmm.uml.nics import nic_option, plug_request, unplug_request
from kit.kata import wait_for
from kit.uml_guest import needs_uml

pytestmark = needs_uml

BY_NAME = NetworkSettings(tap_owner=NOBODY)
BLOB_BYTES = 4 << 20

UP = """
ip link set vec0 name eth0; ip address add 10.97.3.2/24 dev eth0; ip address add fd97:0:0:3::2/64 dev eth0
echo MAC $(cat /sys/class/net/eth0/address) MTU $(cat /sys/class/net/eth0/mtu)
echo 0 > /proc/sys/net/ipv6/conf/eth0/accept_dad; ip link set eth0 up
"""


def nic_of(plan: NicPlan) -> Nic:
    interface = plan.interface
    return Nic(plan.number, interface.mac, plan.number + 1, plan.tap, interface.mtu)


async def attach(made: Pod, stack: ReleaseStack, settings: NetworkSettings = BY_NAME) -> PodNetwork:
    notes: list[NetworkRecord | None] = []
    network = await attach_network(made.path, settings, vcpus=1, note=notes.append, stack=stack)
    assert network is not None
    return network


def options(network: PodNetwork) -> list[str]:
    return [nic_option(nic_of(plan)) for plan in network.nics]


@contextmanager
def listening(netns: str, port: int, *command: str) -> Iterator[None]:
    """A program that serves a TCP port in a network namespace; the port is open when this yields."""
    with subprocess.Popen(["nsenter", f"--net=/run/netns/{netns}", *command]) as server:
        try:
            sockets = ("cat", "/proc/net/tcp", "/proc/net/tcp6")
            wait_for(lambda: f":{port:04X} " in inside(netns, *sockets).stdout, f"port {port} is open")
            yield
        finally:
            server.kill()


def answer(netns: str, blob: bytes, *command: str) -> str:
    """What a program in a network namespace prints that reads `blob`."""
    entered = ["nsenter", f"--net=/run/netns/{netns}", *command]
    return subprocess.run(entered, input=blob, check=True, timeout=180, capture_output=True).stdout.decode()


@pytest.mark.parametrize("mtu", [1500, 9000])
async def test_frames_arrive_whole_both_ways(mtu: int) -> None:
    script = f"""{UP}
ping -c 1 10.97.3.1 > /dev/null && echo PING4 && ping -6 -c 1 fd97:0:0:3::1 > /dev/null && echo PING6
ping -s {mtu - 28} -c 1 10.97.3.1 > /dev/null && echo LARGEST
dd if=/dev/urandom of=/tmp/out bs=1M count=4 2> /dev/null
echo SENT $(md5sum < /tmp/out)
echo ARRIVED $(nc 10.97.3.1 7002 < /tmp/out)
nc -l -p 7001 -e md5sum &
while ! grep -q :1B59 /proc/net/tcp /proc/net/tcp6; do :; done
echo LISTENING; read line
"""
    with pod("uml") as made:
        made.plug("eth0", 3, mtu=mtu, mac="52:54:00:aa:bb:cc")
        async with ReleaseStack() as stack:
            network = await attach(made, stack)
            with (
                listening(made.peer, 7002, "busybox", "nc", "-l", "-p", "7002", "-e", "md5sum"),
                tiny_guest(script, options(network), modules=IPV6, netns=made.netns) as guest,
            ):
                assert guest.wait_for("MAC ") == f"52:54:00:aa:bb:cc MTU {mtu}"
                for reached in ("PING4", "PING6", "LARGEST"):
                    guest.wait_for(reached)
                assert guest.wait_for("SENT ") == guest.wait_for("ARRIVED ")
                guest.wait_for("LISTENING")
                blob = os.urandom(BLOB_BYTES)
                arrived = answer(made.peer, blob, "busybox", "nc", "10.97.3.2", "7001")
                assert arrived.split()[0] == hashlib.md5(blob, usedforsecurity=False).hexdigest()
        assert links(made.netns) == ["eth0", "lo"]


async def test_the_interface_goes_down_and_up_and_ends_with_its_kernel() -> None:
    script = f"""{UP}
ping -c 1 10.97.3.1 > /dev/null && echo FIRST
ip link set eth0 down; echo DOWN; read line
ip link set eth0 up; ping -c 1 10.97.3.1 > /dev/null && echo AGAIN; read line
"""
    with pod("uml") as made:
        made.plug("eth0", 3)
        async with ReleaseStack() as stack:
            network = await attach(made, stack, replace(BY_NAME, rx_rate=1_000_000_000, held=True))
            with tiny_guest(script, options(network), modules=IPV6, netns=made.netns) as guest:
                guest.wait_for("FIRST")
                guest.wait_for("DOWN")
                assert "NO-CARRIER" in ip("link", "show", "tap0_kata", netns=made.netns)
                guest.say("go on")
                guest.wait_for("AGAIN")
                shown = inside(made.netns, "tc", "-s", "class", "show", "dev", "tap0_kata").stdout
                assert "Sent 0 bytes" not in shown  # what the guest receives has passed the limit
                guest.end()
            assert "NO-CARRIER" in ip("link", "show", "tap0_kata", netns=made.netns)
        assert (qdiscs(made.netns), links(made.netns)) == ([], ["eth0", "lo"])


async def test_several_are_told_apart_and_one_is_plugged_while_the_guest_runs() -> None:
    script = """
for number in 0 1; do ip address add 10.97.$((number + 3)).2/24 dev vec$number; ip link set vec$number up; done
ping -c 1 10.97.3.1 > /dev/null && ping -c 1 10.97.4.1 > /dev/null && echo BOTH
read line; ip address add 10.97.5.2/24 dev vec2; ip link set vec2 up
ping -c 1 10.97.5.1 > /dev/null && echo PLUGGED; read line
ip link set vec2 down; echo DOWN; read line
[ -e /sys/class/net/vec2 ] || echo UNPLUGGED; read line
"""
    with pod("uml") as made:
        made.plug("eth0", 3)
        made.plug("eth1", 4)
        async with ReleaseStack() as stack:
            network = await attach(made, stack)
            with tiny_guest(script, options(network), modules=IPV6, netns=made.netns) as guest:
                guest.wait_for("BOTH")
                made.plug("eth2", 5)
                _, [new], _ = await network.compare()
                nic = nic_of(await network.attach(new))
                control = Mconsole(guest.pid, guest.directory / "vm/mconsole")
                await control.ask(plug_request(nic))
                guest.say("go on")
                guest.wait_for("PLUGGED")
                guest.say("go on")
                guest.wait_for("DOWN")
                await control.ask(unplug_request(nic))
                guest.say("go on")
                guest.wait_for("UNPLUGGED")
        assert links(made.netns) == ["eth0", "eth1", "eth2", "lo"]
