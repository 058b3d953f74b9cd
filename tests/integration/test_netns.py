"""Taps and tc in a pod's network namespace, without a VM: made, refused, cleaned, undone."""

import asyncio
import json
import os
import secrets
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from msgspec.structs import replace
from netns_helper import Pod, inside, ip, links, pod, qdiscs

from katapod.host import netns
from katapod.host.named_netns import is_netns, make_netns, netns_path, remove_netns
from katapod.host.netns import check_netns, scan_netns
from katapod.model.errors import UsageError
from katapod.model.network import Address, Interface, InterfaceKind, Interworking, NetworkError, NetworkRecord
from katapod.plan.network import NetworkSettings
from katapod.sandbox.network import PodNetwork, attach_network
from katapod.sandbox.release import ReleaseStack

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

BY_NAME = NetworkSettings(tap_owner=65534)
WAYS = pytest.mark.parametrize("settings", [NetworkSettings(), BY_NAME], ids=["handed-over", "by-name"])
BARE: tuple[list[str], list[str]] = ([], ["eth0", "lo"])
FOREIGN = "filter add dev eth0 parent ffff: protocol all u32 match u8 0 0 action mirred egress redirect dev lo"


@pytest.fixture
def wired() -> Iterator[Pod]:
    with pod("tc") as made:
        made.plug("eth0", 3)
        yield made


def state(made: Pod) -> tuple[list[str], list[str]]:
    return qdiscs(made.netns), links(made.netns)


async def attach(
    made: Pod, stack: ReleaseStack, settings: NetworkSettings | None = None, *, vcpus: int = 1
) -> tuple[PodNetwork, list[NetworkRecord | None]]:
    notes: list[NetworkRecord | None] = []
    network = await attach_network(
        made.path, settings or NetworkSettings(), vcpus=vcpus, note=notes.append, stack=stack
    )
    assert network is not None
    return network, notes


@WAYS
async def test_a_start_that_is_cancelled_while_tc_works_leaves_no_filter(
    wired: Pod, monkeypatch: pytest.MonkeyPatch, settings: NetworkSettings
) -> None:
    """Another part of the start has failed meanwhile."""
    real, done = netns._tc, asyncio.Event()

    async def slow_tc(path: Path, lines: Sequence[str], *, force: bool = False) -> None:
        await real(path, lines, force=force)
        done.set()
        await asyncio.sleep(0.2)

    monkeypatch.setattr(netns, "_tc", slow_tc)

    async def start() -> None:
        async with ReleaseStack() as stack:
            await attach(wired, stack, settings)

    starting = asyncio.create_task(start())
    await done.wait()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert state(wired) == BARE


async def test_a_tap_and_two_redirects_are_made_and_undone(wired: Pod) -> None:
    stack = ReleaseStack()
    network, notes = await attach(wired, stack, vcpus=2)
    assert len(network.fds[0]) == 2
    assert notes[0] is not None
    assert notes[0].nics[0].tap == "tap0_kata"
    assert notes[0].inode == wired.inode
    assert state(wired) == (["eth0 ingress", "tap0_kata ingress"], ["eth0", "lo", "tap0_kata"])
    shown = inside(wired.netns, "tc", "filter", "show", "dev", "tap0_kata", "ingress").stdout
    assert "u32" in shown
    assert "match 00000000/00000000 at 0" in shown
    assert "mirred (Egress Redirect to device eth0) stolen" in shown
    await stack.aclose()
    assert state(wired) == BARE


def user_of(made: Pod, tap: str) -> tuple[str, bool]:
    """Who may open a tap, and whether it stays when nobody has it open."""
    [link] = json.loads(ip("-j", "-d", "link", "show", tap, netns=made.netns))
    data = link["linkinfo"]["info_data"]
    return str(data.get("user", "")), bool(data["persist"])


async def test_a_tap_that_its_owner_opens_by_name(wired: Pod) -> None:
    stack = ReleaseStack()
    network, notes = await attach(wired, stack, replace(BY_NAME, rx_rate=10_000_000), vcpus=2)
    assert user_of(wired, "tap0_kata") == ("nobody", True)
    assert qdiscs(wired.netns) == ["eth0 ingress", "tap0_kata htb", "tap0_kata ingress"]
    request = struct.pack("16sH22x", b"tap0_kata", 0x5002)  # IFF_TAP, IFF_NO_PI, IFF_VNET_HDR
    open_it = f"fcntl.ioctl(open('/dev/net/tun', 'r+b', buffering=0), 0x400454CA, {request!r})"
    for user, allowed in ((65534, True), (65533, False)):
        script = f"import fcntl, os; os.setgroups([]); os.setuid({user}); {open_it}"
        done = inside(wired.netns, sys.executable, "-c", script, check=False)
        assert (done.returncode == 0) is allowed, done.stderr
        assert allowed or "PermissionError" in done.stderr
    assert "tap0_kata" in links(wired.netns)  # whoever opened it has ended
    await stack.aclose()
    assert state(wired) == BARE
    assert notes[-1] is None
    assert network.fds == {}


async def test_a_tap_of_the_pods_own_is_given_to_the_user_who_opens_it(wired: Pod) -> None:
    ip("tuntap", "add", "vmtap", "mode", "tap", "vnet_hdr", netns=wired.netns)
    ip("addr", "add", "10.97.9.2/24", "dev", "vmtap", netns=wired.netns)
    stack = ReleaseStack()
    await attach(wired, stack, BY_NAME)
    assert user_of(wired, "vmtap") == ("nobody", True)
    await stack.aclose()
    assert links(wired.netns) == ["eth0", "lo", "vmtap"]


@pytest.mark.parametrize("model", Interworking)
async def test_frames_are_held_to_the_addresses(wired: Pod, model: Interworking) -> None:
    """Said again after a change of addresses, the filter is another, and still one."""
    stack = ReleaseStack()
    network, _ = await attach(wired, stack, NetworkSettings(model, held=True))
    way = "egress" if model is Interworking.MACVTAP else "ingress"

    def shown() -> list[str]:
        text = inside(wired.netns, "tc", "filter", "show", "dev", "tap0_kata", way).stdout
        return [line for line in text.splitlines() if "direct-action" in line or "bytecode" in line]

    first = shown()
    assert len([line for line in first if "handle 0x1" in line]) == 1, first
    ip("addr", "add", "10.97.3.77/24", "dev", "eth0", netns=wired.netns)
    changed = next(interface for interface in (await scan_netns(wired.path)).interfaces if interface.name == "eth0")
    await network.take_change(changed)
    second = shown()
    assert len(second) == len(first)
    assert second != first
    await stack.aclose()
    assert links(wired.netns) == BARE[1]
    assert qdiscs(wired.netns) == []


@WAYS
async def test_a_second_sandbox_is_refused_and_the_first_keeps_its_own(wired: Pod, settings: NetworkSettings) -> None:
    """Also where nobody has opened the first one's tap yet."""
    stack, other = ReleaseStack(), ReleaseStack()
    await attach(wired, stack, settings)
    before = state(wired)
    for late in (NetworkSettings(), BY_NAME):
        with pytest.raises(NetworkError, match="another sandbox uses it"):
            await attach(wired, other, late)
        await other.aclose()
    assert state(wired) == before
    await stack.aclose()
    assert state(wired) == BARE


async def test_what_a_dead_sandbox_left_is_taken_away(wired: Pod) -> None:
    ip("tuntap", "add", "tap0_kata", "mode", "tap", netns=wired.netns)
    inside(wired.netns, "tc", "qdisc", "add", "dev", "eth0", "ingress")
    redirect = "parent ffff: protocol all u32 match u8 0 0 action mirred egress redirect dev tap0_kata"
    inside(wired.netns, "tc", "filter", "add", "dev", "eth0", *redirect.split())
    stack = ReleaseStack()
    await attach(wired, stack)
    assert qdiscs(wired.netns) == ["eth0 ingress", "tap0_kata ingress"]
    await stack.aclose()
    assert state(wired) == BARE


async def test_filters_of_others_stay(wired: Pod) -> None:
    inside(wired.netns, "tc", "qdisc", "add", "dev", "eth0", "ingress")
    inside(wired.netns, *f"tc {FOREIGN}".split())
    before = state(wired)
    stack = ReleaseStack()
    with pytest.raises(NetworkError, match="cannot redirect the interface eth0"):
        await attach(wired, stack)
    await stack.aclose()
    assert state(wired) == before


async def test_a_macvtap_takes_the_address_and_gives_it_back(wired: Pod) -> None:
    before = (await scan_netns(wired.path)).interfaces[0]
    stack = ReleaseStack()
    network, _ = await attach(wired, stack, NetworkSettings(model=Interworking.MACVTAP))
    assert network.fds[0]
    assert "tap0_kata" in links(wired.netns)
    assert before.mac in ip("link", "show", "tap0_kata", netns=wired.netns)
    assert before.mac not in ip("link", "show", "eth0", netns=wired.netns)
    await stack.aclose()
    assert state(wired) == BARE
    after = (await scan_netns(wired.path)).interfaces[0]
    assert (after.mac, given_addresses(after)) == (before.mac, given_addresses(before))


def given_addresses(interface: Interface) -> set[Address]:
    """Without the link-local one, which the kernel makes when it comes to it."""
    return {each for each in interface.addresses if not each.address.startswith("fe80:")}


@WAYS
async def test_what_a_killed_supervisor_left_is_taken_away_by_the_next(wired: Pod, settings: NetworkSettings) -> None:
    network, _ = await attach(wired, ReleaseStack(), settings)
    for nic in network.nics:
        network.let_go(nic)
    stack = ReleaseStack()
    await attach(wired, stack)
    assert qdiscs(wired.netns) == ["eth0 ingress", "tap0_kata ingress"]
    await stack.aclose()
    assert state(wired) == BARE


@WAYS
async def test_a_record_alone_undoes_it(wired: Pod, settings: NetworkSettings) -> None:
    from katapod.host.netns import detach_recorded

    stack = ReleaseStack()
    network, notes = await attach(wired, stack, settings)
    for nic in network.nics:
        network.let_go(nic)  # as when its supervisor is killed: the qdisc stays, and a tap that is opened by name
    assert "eth0 ingress" in qdiscs(wired.netns)
    assert ("tap0_kata" in links(wired.netns)) is (settings is BY_NAME)
    left = notes[-1]
    assert left is not None
    await detach_recorded(left)
    assert state(wired) == BARE
    await detach_recorded(left)
    ip("netns", "del", wired.netns)
    await detach_recorded(left)


async def test_the_hosts_own_namespace_is_refused() -> None:
    with pytest.raises(UsageError, match="the host's own"):
        check_netns(Path("/proc/self/ns/net"))
    with pytest.raises(NetworkError, match="there is none"):
        check_netns(Path("/run/netns/no-such-namespace"))


async def test_a_tap_is_used_as_it_is(wired: Pod) -> None:
    ip("tuntap", "add", "vmtap", "mode", "tap", "vnet_hdr", netns=wired.netns)
    ip("addr", "add", "10.97.9.2/24", "dev", "vmtap", netns=wired.netns)
    found = {interface.name: interface.kind for interface in (await scan_netns(wired.path)).interfaces}
    assert found == {"eth0": InterfaceKind.VETH, "vmtap": InterfaceKind.TAP}
    before = state(wired)
    stack = ReleaseStack()
    network, _ = await attach(wired, stack)
    assert network.nics[1].direct
    assert "tap1_kata" not in links(wired.netns)
    await stack.aclose()
    assert state(wired) == before


async def test_a_tun_device_cannot_be_given_to_a_guest(wired: Pod) -> None:
    ip("tuntap", "add", "vpn0", "mode", "tun", netns=wired.netns)
    ip("addr", "add", "10.97.9.2/24", "dev", "vpn0", netns=wired.netns)
    with pytest.raises(NetworkError, match=r"vpn0.*tun in IP mode"):
        await scan_netns(wired.path)


def test_a_namespace_that_is_there_gets_a_name_and_keeps_it_without_its_process() -> None:
    path = netns_path(f"t{os.getpid()}-{secrets.token_hex(4)}")
    with subprocess.Popen(["unshare", "--net", "sh", "-c", "echo; read line"], stdin=-1, stdout=-1) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        fd = os.open(f"/proc/{holder.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        holder.kill()
    try:
        asyncio.run(make_netns(path, fd))
        assert is_netns(path)
        assert os.stat(path).st_ino == os.fstat(fd).st_ino
        assert "LOOPBACK,UP" in ip("link", "show", "lo", netns=path.name)
        remove_netns(path)
        assert not path.exists()
    finally:
        os.close(fd)
        remove_netns(path)
