"""A classic BPF program that holds a guest's frames to its own MAC address and IP addresses. Pure.

It runs at the ingress of the guest's tap, ahead of the redirection: what it does not know to be the guest's own is
dropped there, before anything on the host has looked at it.

Source: Documentation/networking/filter.rst, linux/bpf_common.h, tc-bpf(8); frames: RFC 826, 791, 8200, 4861, 3810.
"""

import ipaddress
from collections.abc import Iterable

from msgspec import Struct, field
from msgspec.structs import replace

from katapod.model.network import Address

__all__ = ["PASS", "SHOT", "Instruction", "bytecode", "plan_held_frames"]

PASS, SHOT = 0xFFFFFFFF, 2  # TC_ACT_UNSPEC: on to the next filter, which redirects; TC_ACT_SHOT

_LD_W, _LD_H, _LD_B, _LD_LEN = 0x20, 0x28, 0x30, 0x80
_JEQ, _JGE, _JA, _RET = 0x15, 0x35, 0x05, 0x06
_VLAN_TAG_PRESENT = 0xFFFFF000 + 48  # SKF_AD_OFF + SKF_AD_VLAN_TAG_PRESENT

_TYPE, _L3 = 12, 14  # offsets in the frame: EtherType, what follows the Ethernet header
_IP4_SOURCE, _IP4_DEST, _IP4_END = _L3 + 12, _L3 + 16, _L3 + 20
_ARP_LENGTHS, _ARP_MAC, _ARP_SOURCE, _ARP_TARGET, _ARP_END = _L3 + 4, _L3 + 8, _L3 + 14, _L3 + 24, _L3 + 28
_IP6_NEXT, _IP6_SOURCE, _IP6_END = _L3 + 6, _L3 + 8, _L3 + 40
_ND_TARGET, _ND_END = _IP6_END + 8, _IP6_END + 24
_HOP_BY_HOP, _ROUTING, _ICMP6, _DEST_OPTIONS = 0, 43, 58, 60
_ROUTER_ADVERT, _SOLICIT, _ADVERT, _REDIRECT = 134, 135, 136, 137
_MLD = (131, 132, 143)  # reports and done; they carry a hop-by-hop header of eight bytes


class Instruction(Struct, frozen=True):
    """struct sock_filter."""

    code: int
    jt: int
    jf: int
    k: int


class _Assembler(Struct):
    """Instructions whose jumps lead forward, to labels. A conditional jump reaches 255 instructions only, so it goes
    round a JA that reaches any."""

    code: list[tuple[Instruction, str]] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def label(self, name: str) -> None:
        self.labels[name] = len(self.code)

    def emit(self, code: int, value: int, target: str = "") -> None:
        self.code.append((Instruction(code, 0, 0, value), target))

    def jump_if(self, operation: int, value: int, target: str) -> None:
        self.code.append((Instruction(operation, 0, 1, value), ""))
        self.go(target)

    def jump_unless(self, operation: int, value: int, target: str) -> None:
        self.code.append((Instruction(operation, 1, 0, value), ""))
        self.go(target)

    def go(self, target: str) -> None:
        self.emit(_JA, 0, target)

    def assemble(self) -> tuple[Instruction, ...]:
        return tuple(
            replace(each, k=self.labels[target] - at - 1) if target else each
            for at, (each, target) in enumerate(self.code)
        )

    def expect(self, offset: int, value: bytes, otherwise: str) -> None:
        """Go on if these bytes, an even number of them, are there."""
        at = 0
        while at < len(value):
            kind, size = (_LD_W, 4) if len(value) - at >= 4 else (_LD_H, 2)
            self.emit(kind, offset + at)
            self.jump_unless(_JEQ, int.from_bytes(value[at : at + size], "big"), otherwise)
            at += size

    def expect_length(self, least: int) -> None:
        """What lies beyond a frame's end must not be read: the kernel would end the program, and let the frame by."""
        self.emit(_LD_LEN, 0)
        self.jump_unless(_JGE, least, "drop")

    def expect_one(self, offset: int, values: Iterable[bytes], then: str, otherwise: str) -> None:
        for number, value in enumerate(values):
            missed = f"{then}-{offset}-{len(self.code)}-{number}"
            self.expect(offset, value, otherwise=missed)
            self.go(then)
            self.label(missed)
        self.go(otherwise)


def plan_held_frames(mac: str, addresses: Iterable[Address]) -> tuple[Instruction, ...]:
    """Pass what the guest may send: ARP and IPv4 from its addresses, and IPv6 where it has more than a link-local one.

    Dropped are other EtherTypes and VLAN tags, what is for or from 127.0.0.0/8, ARP that claims another's address,
    IPv6 neighbour advertisements for others' addresses, router advertisements and redirects, also behind extension
    headers. IPv4 without an address (0.0.0.0) is dropped too: whoever attached the guest has given it one.
    """
    own = [ipaddress.ip_address(address.address) for address in addresses]
    four = [one.packed for one in own if one.version == 4]
    six = [one.packed for one in own if one.version == 6]
    if all(ipaddress.IPv6Address(one).is_link_local for one in six):
        six = []
    else:
        six = list(dict.fromkeys([*six, _link_local(mac)]))
    mac_bytes = bytes.fromhex(mac.replace(":", ""))
    program = _Assembler()
    program.emit(_LD_W, _VLAN_TAG_PRESENT)  # one tag is taken off before filters see the frame
    program.jump_unless(_JEQ, 0, "drop")
    program.expect_length(_L3)
    program.expect(6, mac_bytes, otherwise="drop")
    program.emit(_LD_H, _TYPE)
    program.jump_if(_JEQ, 0x0800, "ip4")
    program.jump_if(_JEQ, 0x0806, "arp")
    if six:
        program.jump_if(_JEQ, 0x86DD, "ip6")
    program.go("drop")
    _plan_ip4(program, four)
    _plan_arp(program, mac_bytes, four)
    if six:
        _plan_ip6(program, six)
    program.label("pass")
    program.emit(_RET, PASS)
    program.label("drop")
    program.emit(_RET, SHOT)
    return program.assemble()


def _plan_ip4(program: _Assembler, own: list[bytes]) -> None:
    program.label("ip4")
    program.expect_length(_IP4_END)
    program.emit(_LD_B, _IP4_DEST)
    program.jump_if(_JEQ, 127, "drop")
    program.expect_one(_IP4_SOURCE, own, "pass", "drop")


def _plan_arp(program: _Assembler, mac: bytes, own: list[bytes]) -> None:
    program.label("arp")
    program.expect_length(_ARP_END)
    program.expect(_ARP_LENGTHS, b"\x06\x04", otherwise="drop")
    program.expect(_ARP_MAC, mac, otherwise="drop")
    program.expect_one(_ARP_SOURCE, own, "pass", "arp-probe")
    program.label("arp-probe")  # RFC 5227: from nobody, for what it is about to use
    program.expect(_ARP_SOURCE, bytes(4), otherwise="drop")
    program.expect_one(_ARP_TARGET, own, "pass", "drop")


def _plan_ip6(program: _Assembler, own: list[bytes]) -> None:
    program.label("ip6")
    program.expect_length(_IP6_END)
    program.emit(_LD_B, _IP6_NEXT)
    program.jump_if(_JEQ, _ICMP6, "icmp6")
    program.jump_if(_JEQ, _HOP_BY_HOP, "hop-by-hop")
    for header in (_ROUTING, _DEST_OPTIONS):  # neighbour discovery could hide behind them
        program.jump_if(_JEQ, header, "drop")
    program.label("own6")
    program.expect_one(_IP6_SOURCE, own, "pass", "drop")
    program.label("icmp6")
    program.expect_length(_IP6_END + 8)
    program.emit(_LD_B, _IP6_END)
    program.jump_if(_JEQ, _ADVERT, "advert")
    program.jump_if(_JEQ, _SOLICIT, "own6-or-none")
    for kind in (_ROUTER_ADVERT, _REDIRECT):
        program.jump_if(_JEQ, kind, "drop")
    program.go("own6-again")
    program.label("advert")
    program.expect_length(_ND_END)
    program.expect_one(_ND_TARGET, own, "own6-again", "drop")
    program.label("hop-by-hop")
    program.expect_length(_IP6_END + 16)
    program.expect(_IP6_END, bytes((_ICMP6, 0)), otherwise="drop")
    program.emit(_LD_B, _IP6_END + 8)
    for kind in _MLD:
        program.jump_if(_JEQ, kind, "own6-or-none")
    program.go("drop")
    program.label("own6-or-none")
    program.expect_one(_IP6_SOURCE, [*own, bytes(16)], "pass", "drop")
    program.label("own6-again")
    program.expect_one(_IP6_SOURCE, own, "pass", "drop")


def _link_local(mac: str) -> bytes:
    """What the guest's kernel makes of its MAC address. RFC 4291, appendix A."""
    parts = bytes.fromhex(mac.replace(":", ""))
    return bytes.fromhex("fe80000000000000") + bytes((parts[0] ^ 2,)) + parts[1:3] + b"\xff\xfe" + parts[3:]


def bytecode(program: tuple[Instruction, ...]) -> str:
    """As tc-bpf(8) takes it: the number of instructions, then each as four numbers."""
    return ",".join([str(len(program)), *(f"{each.code} {each.jt} {each.jf} {each.k}" for each in program)])
