"""BPF programs that name the socket for what comes to a port, whoever listens there or nobody does.

A program stands where the kernel looks for the socket of a new TCP connection or of a UDP packet, and is attached to a
network namespace for as long as its descriptor is held: it goes with the process, however that ends. No rule, route or
address of the namespace changes. Source: bpf(2), linux/bpf.h; BPF_PROG_TYPE_SK_LOOKUP is in Linux since 5.9.
"""

from __future__ import annotations

import _socket
import ctypes
import os
import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Target", "attach_lookup", "lookup_program"]

_BPF = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351}
_MAP_CREATE, _MAP_UPDATE, _PROG_LOAD, _LINK_CREATE = 0, 2, 5, 28
_SOCKMAP, _SK_LOOKUP, _ATTACH_SK_LOOKUP = 15, 30, 36

# Opcodes of linux/bpf.h and linux/bpf_common.h, and numbers of helpers
_LOAD_WORD, _LOAD_BYTE, _STORE_WORD, _LOAD_IMM64 = 0x61, 0x71, 0x63, 0x18
_MOVE, _MOVE_IMM, _ADD_IMM, _CALL, _EXIT = 0xBF, 0xB7, 0x07, 0x85, 0x95
_JUMP, _JUMP_EQUAL, _JUMP_NOT_EQUAL32 = 0x05, 0x15, 0x56
_MAP_LOOKUP, _SK_ASSIGN, _SK_RELEASE = 1, 124, 86
_MAP_FD = 1  # as the source register of _LOAD_IMM64: the value is a map's descriptor
_SK_PASS = 1
# Offsets in struct bpf_sk_lookup
_FAMILY, _PROTOCOL, _LOCAL_IP4, _LOCAL_IP6, _LOCAL_PORT = 8, 12, 40, 44, 60


class Target:
    """What comes to an address, or to all that begin with `address`, by one protocol."""

    def __init__(self, protocol: int, address: bytes, *, family: int = _socket.AF_INET, port: int = 0) -> None:
        """`address`: one byte, or all of the family's. `port` 0: any."""
        self.protocol, self.family, self.address, self.port = protocol, family, address, port


def attach_lookup(netns_fd: int, rules: Sequence[tuple[Target, _socket.socket | None]]) -> int:
    """For each target, in their order, the socket in that network namespace that gets it: one that listens, or of UDP a
    bound one. None: as usual, as for what no rule is for. Returns the descriptor that holds it. Raises OSError."""
    fds: list[int] = []  # the link holds the program, and that the map
    try:
        map_fd = _bpf(_MAP_CREATE, struct.pack("=IIII", _SOCKMAP, 4, 8, max(1, len(rules))))
        fds.append(map_fd)
        for key, (_, found) in enumerate(rules):
            if found is not None:
                _update(map_fd, key, found.fileno())
        targets = [(target, found is not None) for target, found in rules]
        program_fd = _load(lookup_program(map_fd, targets))
        fds.append(program_fd)
        return _bpf(_LINK_CREATE, struct.pack("=IIII", program_fd, netns_fd, _ATTACH_SK_LOOKUP, 0))
    finally:
        for fd in fds:
            os.close(fd)


def _bpf(command: int, attributes: bytes) -> int:
    """bpf(2); descriptors that it returns are closed on exec. Raises OSError."""
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    libc = ctypes.CDLL(None, use_errno=True)
    number = ctypes.c_long(_BPF[os.uname().machine])
    result = int(libc.syscall(number, ctypes.c_int(command), buffer, ctypes.c_uint(len(attributes))))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"bpf({command}): {os.strerror(error)}")
    return result


def _update(map_fd: int, key: int, value: int) -> None:
    key_cell, value_cell = ctypes.c_uint32(key), ctypes.c_uint64(value)
    _bpf(_MAP_UPDATE, struct.pack("=IIQQQ", map_fd, 0, ctypes.addressof(key_cell), ctypes.addressof(value_cell), 0))


def _load(program: bytes) -> int:
    code = ctypes.create_string_buffer(program, len(program))
    licence = ctypes.create_string_buffer(b"Apache-2.0")
    head = struct.pack("=IIQQ", _SK_LOOKUP, len(program) // 8, ctypes.addressof(code), ctypes.addressof(licence))
    no_log = struct.pack("=IIQII", 0, 0, 0, 0, 0)
    return _bpf(_PROG_LOAD, head + no_log + struct.pack("=16sII", b"katapod_lookup", 0, _ATTACH_SK_LOOKUP))


def lookup_program(map_fd: int, targets: Sequence[tuple[Target, bool]]) -> bytes:
    """The program for `struct bpf_sk_lookup *` in r1: the first target that fits decides, and its number is the key of
    its socket in the map; False: none is meant."""
    code = _Code()
    code.add(_MOVE, to=6, of=1)
    for key, (target, assigned) in enumerate(targets):
        following = f"after {key}"
        for opcode, offset, value in _comparisons(target):
            code.add(opcode, to=2, of=6, offset=offset)
            code.jump(_JUMP_NOT_EQUAL32, 2, value, following)
        if assigned:
            code.add(_MOVE_IMM, to=7, value=key)
        code.jump(_JUMP, 0, 0, "assign" if assigned else "pass")
        code.label(following)
    code.jump(_JUMP, 0, 0, "pass")
    code.label("assign")
    code.add(_STORE_WORD, to=10, of=7, offset=-4)
    code.add(_LOAD_IMM64, to=1, of=_MAP_FD, value=map_fd)
    code.add(0)  # the upper half of the value
    code.add(_MOVE, to=2, of=10)
    code.add(_ADD_IMM, to=2, value=-4)
    code.add(_CALL, value=_MAP_LOOKUP)
    code.jump(_JUMP_EQUAL, 0, 0, "pass")
    code.add(_MOVE, to=7, of=0)
    code.add(_MOVE, to=1, of=6)
    code.add(_MOVE, to=2, of=7)
    code.add(_MOVE_IMM, to=3, value=0)
    code.add(_CALL, value=_SK_ASSIGN)
    code.add(_MOVE, to=1, of=7)
    code.add(_CALL, value=_SK_RELEASE)
    code.label("pass")
    code.add(_MOVE_IMM, to=0, value=_SK_PASS)
    code.add(_EXIT)
    return code.assemble()


def _comparisons(target: Target) -> list[tuple[int, int, int]]:
    """(load, offset, value) of all that has to be equal. Addresses are in network order, the port is in the host's."""
    found = [(_LOAD_WORD, _PROTOCOL, target.protocol), (_LOAD_WORD, _FAMILY, int(target.family))]
    start = _LOCAL_IP4 if target.family == _socket.AF_INET else _LOCAL_IP6
    if len(target.address) == 1:
        found.append((_LOAD_BYTE, start, target.address[0]))
    else:
        for at in range(0, len(target.address), 4):
            word = int.from_bytes(target.address[at : at + 4], sys.byteorder, signed=True)
            found.append((_LOAD_WORD, start + at, word))
    if target.port:
        found.append((_LOAD_WORD, _LOCAL_PORT, target.port))
    return found


class _Code:
    """Instructions of 8 bytes, jumps to names."""

    def __init__(self) -> None:
        self._made: list[Callable[[int], bytes]] = []
        self._labels: dict[str, int] = {}

    def add(self, opcode: int, *, to: int = 0, of: int = 0, offset: int = 0, value: int = 0) -> None:
        self._made.append(lambda at: _instruction(opcode, to, of, offset, value))

    def jump(self, opcode: int, register: int, value: int, label: str) -> None:
        self._made.append(lambda at: _instruction(opcode, register, 0, self._labels[label] - at - 1, value))

    def label(self, name: str) -> None:
        self._labels[name] = len(self._made)

    def assemble(self) -> bytes:
        return b"".join(make(at) for at, make in enumerate(self._made))


def _instruction(opcode: int, to: int, of: int, offset: int, value: int) -> bytes:
    registers = of << 4 | to if sys.byteorder == "little" else to << 4 | of
    return struct.pack("=BBhi", opcode, registers, offset, value)
