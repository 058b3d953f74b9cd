"""What a guest may send, by running the filter's program as the kernel does."""

import ipaddress
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from katapod.model.network import Address
from katapod.plan.frames import PASS, SHOT, Instruction, bytecode, plan_held_frames

MAC, OTHER_MAC = "02:00:00:00:00:02", "02:00:00:00:00:99"
OWN, OWN6, LINK_LOCAL = "10.186.0.2", "fd00::2", "fe80::ff:fe00:2"
V4 = plan_held_frames(MAC, [Address(OWN, 16), Address("10.186.0.3", 16), Address(LINK_LOCAL, 64)])
V6 = plan_held_frames(MAC, [Address(OWN, 16), Address(OWN6, 64)])


def run_filter(program: tuple[Instruction, ...], frame: bytes, *, tagged: bool = False) -> int:
    """struct sock_filter by struct sock_filter; a read beyond the frame is an error here, and a hole in the kernel."""
    at = accumulator = 0
    while True:
        step = program[at]
        at += 1
        match step.code:
            case 0x20 if step.k >= 0xFFFFF000:
                assert step.k == 0xFFFFF000 + 48
                accumulator = int(tagged)
            case 0x20 | 0x28 | 0x30:
                size = {0x20: 4, 0x28: 2, 0x30: 1}[step.code]
                assert step.k + size <= len(frame), f"instruction {at} reads beyond a frame of {len(frame)} bytes"
                accumulator = int.from_bytes(frame[step.k : step.k + size], "big")
            case 0x80:
                accumulator = len(frame)
            case 0x15:
                at += step.jt if accumulator == step.k else step.jf
            case 0x35:
                at += step.jt if accumulator >= step.k else step.jf
            case 0x05:
                at += step.k
            case 0x06:
                return step.k
            case code:
                raise AssertionError(f"code {code:#x}")


def raw(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", "")) if text.count(":") == 5 else ipaddress.ip_address(text).packed


def ethernet(kind: int, payload: bytes, source: str = MAC) -> bytes:
    return raw("02:00:00:00:00:01") + raw(source) + struct.pack("!H", kind) + payload


def ip4(source: str, dest: str, mac: str = MAC) -> bytes:
    return ethernet(0x0800, bytes.fromhex("45000014000000004011") + bytes(2) + raw(source) + raw(dest), mac)


def arp(sender: str, target: str, mac: str = MAC, source: str = MAC) -> bytes:
    return ethernet(0x0806, bytes.fromhex("0001080006040001") + raw(mac) + raw(sender) + bytes(6) + raw(target), source)


def ip6(source: str, following: int, payload: bytes = bytes(40)) -> bytes:
    return ethernet(0x86DD, b"\x60\0\0\0\0\0" + bytes((following, 255)) + raw(source) + raw("ff02::1") + payload)


def icmp6(kind: int, target: str = "::") -> bytes:
    return bytes((kind, 0, 0, 0, 0, 0, 0, 0)) + raw(target)


MLD = bytes((58, 0, 5, 2, 0, 0, 1, 0)) + icmp6(143)

OURS = {
    "IPv4": ip4(OWN, "1.1.1.1"),
    "another of its addresses": ip4("10.186.0.3", "10.186.0.1"),
    "a broadcast": ip4(OWN, "255.255.255.255"),
    "ARP": arp(OWN, "10.186.0.1"),
    "an ARP probe": arp("0.0.0.0", OWN),
}
NOT_OURS = {
    "the host's loopback": ip4(OWN, "127.0.0.1"),
    "all of it": ip4(OWN, "127.255.3.4"),
    "from the loopback": ip4("127.0.0.1", "10.186.0.1"),
    "another's address": ip4("10.186.0.4", "10.186.0.1"),
    "no address": ip4("0.0.0.0", "255.255.255.255"),
    "another MAC address": ip4(OWN, "10.186.0.1", OTHER_MAC),
    "ARP for another": arp("10.186.0.1", "10.186.0.4"),
    "ARP with another's MAC address": arp(OWN, "10.186.0.1", OTHER_MAC),
    "ARP from another MAC address": arp(OWN, "10.186.0.1", source=OTHER_MAC),
    "an ARP probe for another's": arp("0.0.0.0", "10.186.0.1"),
    "IPv6 without an address": ip6(LINK_LOCAL, 17),
    "a VLAN tag": ethernet(0x8100, b"\0\0\x08\0" + ip4(OWN, "127.0.0.1")[14:]),
    "a bridge protocol data unit": ethernet(0x0026, b"\x42\x42\x03" + bytes(40)),
    "a runt": ethernet(0x0800, b""),
}
OURS6 = {
    "IPv6": ip6(OWN6, 6),
    "its link-local address": ip6(LINK_LOCAL, 17),
    "a solicitation": ip6(OWN6, 58, icmp6(135, "fd00::1")),
    "duplicate address detection": ip6("::", 58, icmp6(135, OWN6)),
    "its own advertisement": ip6(OWN6, 58, icmp6(136, LINK_LOCAL)),
    "an echo request": ip6(OWN6, 58, icmp6(128)),
    "membership": ip6(LINK_LOCAL, 0, MLD),
    "a fragment": ip6(OWN6, 44),
}
NOT_OURS6 = {
    "another's address": ip6("fd00::3", 6),
    "another's advertisement": ip6(OWN6, 58, icmp6(136, "fd00::3")),
    "an advertisement from another": ip6("fd00::3", 58, icmp6(136, OWN6)),
    "a router advertisement": ip6(LINK_LOCAL, 58, icmp6(134)),
    "a redirect": ip6(LINK_LOCAL, 58, icmp6(137)),
    "no address": ip6("::", 17),
    "something behind options": ip6(OWN6, 60, bytes((58, 0, 1, 4, 0, 0, 0, 0)) + icmp6(136, "fd00::3")),
    "something behind hop-by-hop options": ip6(OWN6, 0, bytes((58, 0, 1, 4, 0, 0, 0, 0)) + icmp6(136, "fd00::3")),
    "the host's loopback": ip4(OWN, "127.0.0.1"),
}


@pytest.mark.parametrize("what", OURS)
def test_what_is_its_own_passes(what: str) -> None:
    assert run_filter(V4, OURS[what]) == run_filter(V6, OURS["IPv4"]) == PASS
    assert run_filter(V4, OURS[what], tagged=True) == SHOT


@pytest.mark.parametrize("what", NOT_OURS)
def test_what_is_not_its_own_is_dropped(what: str) -> None:
    assert run_filter(V4, NOT_OURS[what]) == SHOT


@pytest.mark.parametrize("what", OURS6)
def test_its_own_ipv6_passes(what: str) -> None:
    assert run_filter(V6, OURS6[what]) == PASS
    assert run_filter(V4, OURS6[what]) == SHOT


@pytest.mark.parametrize("what", NOT_OURS6)
def test_ipv6_that_is_not_its_own_is_dropped(what: str) -> None:
    assert run_filter(V6, NOT_OURS6[what]) == SHOT


@given(st.sampled_from([*OURS.values(), *NOT_OURS.values(), *OURS6.values(), *NOT_OURS6.values()]), st.data())
def test_no_frame_is_read_beyond_its_end(frame: bytes, data: st.DataObject) -> None:
    """A read beyond it would end the program with 0, and 0 lets the frame into the namespace's own stack."""
    kept = data.draw(st.integers(14, len(frame)))
    for program in (V4, V6):
        assert run_filter(program, frame[:kept]) in (PASS, SHOT)


def test_jumps_lead_forward_and_stay_inside() -> None:
    many = plan_held_frames(MAC, [Address(f"fd00::{number}", 64) for number in range(1, 40)])
    for at, step in enumerate(many):
        assert 0 <= step.jt <= 255
        assert at + 1 + (step.k if step.code == 5 else max(step.jt, step.jf)) <= len(many)
    assert run_filter(many, ip6("fd00::39", 6)) == PASS


def test_bytecode() -> None:
    assert bytecode((Instruction(6, 0, 0, SHOT),)) == "1,6 0 0 2"
