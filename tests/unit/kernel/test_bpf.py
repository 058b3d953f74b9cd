"""Programs that look up sockets: every jump of them ends at an instruction."""

import socket
import struct

from katapod.kernel.bpf import Target, lookup_program


def test_jumps() -> None:
    six = Target(socket.IPPROTO_TCP, socket.inet_pton(socket.AF_INET6, "::1"), family=socket.AF_INET6)
    four = Target(socket.IPPROTO_UDP, socket.inet_aton("127.0.0.11"), port=53)
    program = lookup_program(7, [(four, False), (six, True), (Target(socket.IPPROTO_TCP, b"\x7f"), True)])
    code = [struct.unpack_from("=BBhi", program, at) for at in range(0, len(program), 8)]
    jumps = {0x05, 0x15, 0x56}
    targets = [at + 1 + offset for at, (opcode, _, offset, _) in enumerate(code) if opcode in jumps]
    assert all(at < target < len(code) for at, target in zip(_jumping(code, jumps), targets, strict=True))
    assert (0x56, 2, 53) in {(opcode, registers & 15, value) for opcode, registers, _, value in code}
    assert code[-1][0] == 0x95


def _jumping(code: list[tuple[int, int, int, int]], jumps: set[int]) -> list[int]:
    return [at for at, (opcode, *_) in enumerate(code) if opcode in jumps]
