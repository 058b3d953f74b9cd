"""A listener for whatever port of a network namespace's loopback somebody connects to.

A small BPF program stands where the kernel looks for the socket that a connection is for, and names ours. It is
attached to the namespace for as long as we hold its descriptor: it goes with this process, however that ends. No rule,
route or address of the namespace changes. Source: bpf(2), linux/bpf.h; BPF_PROG_TYPE_SK_LOOKUP is in Linux since 5.9.
"""

import contextlib
import ctypes
import os
import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from katapod.host.netns import in_netns
from katapod.host.own_mounts import in_host_mounts

__all__ = ["LoopbackListener", "listen_on_loopback"]

LOOPBACK, LOOPBACK6 = "127.0.0.1", "::1"
BACKLOG = 64

_BPF = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351}
_MAP_CREATE, _MAP_UPDATE, _PROG_LOAD, _LINK_CREATE = 0, 2, 5, 28
_SOCKMAP, _SK_LOOKUP, _ATTACH_SK_LOOKUP = 15, 30, 36
_IPV6_FREEBIND, _IP_FREEBIND = 78, 15

# Opcodes of linux/bpf.h and linux/bpf_common.h, and numbers of helpers
_LOAD_WORD, _LOAD_BYTE, _STORE_WORD, _LOAD_IMM64 = 0x61, 0x71, 0x63, 0x18
_MOVE, _MOVE_IMM, _ADD_IMM, _CALL, _EXIT = 0xBF, 0xB7, 0x07, 0x85, 0x95
_JUMP, _JUMP_EQUAL, _JUMP_NOT_EQUAL = 0x05, 0x15, 0x55
_MAP_LOOKUP, _SK_ASSIGN, _SK_RELEASE = 1, 124, 86
_MAP_FD = 1  # as the source register of _LOAD_IMM64: the value is a map's descriptor
_SK_PASS = 1
# Offsets in struct bpf_sk_lookup
_FAMILY, _PROTOCOL, _LOCAL_IP4, _LOCAL_IP6 = 8, 12, 40, 44


class LoopbackListener(Struct):
    """Listening sockets, not blocking, one for each family that there is. What they accept has as its own address the
    one that the client asked for. The supervisor calls `close`, which is idempotent."""

    sockets: tuple[socket.socket, ...]
    link_fd: int

    def close(self) -> None:
        if self.link_fd >= 0:
            os.close(self.link_fd)
            self.link_fd = -1
        for each in self.sockets:
            each.close()


def listen_on_loopback(netns: Path) -> LoopbackListener:
    """Listen for TCP connections to 127.0.0.0/8 and ::1 of the namespace, any port. Raises OSError; blocks."""
    with contextlib.ExitStack() as undo:
        sockets = in_netns(netns, lambda: _listen(undo))
        map_fd = _bpf(_MAP_CREATE, struct.pack("=IIII", _SOCKMAP, 4, 8, len(sockets)))
        with contextlib.ExitStack() as fds:  # the link holds the program, and that the map
            fds.callback(os.close, map_fd)
            for index, each in enumerate(sockets):
                _update(map_fd, index, each.fileno())
            program_fd = _load(_program(map_fd))
            fds.callback(os.close, program_fd)
            netns_fd = in_host_mounts(lambda: os.open(netns, os.O_RDONLY | os.O_CLOEXEC))
            fds.callback(os.close, netns_fd)
            link_fd = _bpf(_LINK_CREATE, struct.pack("=IIII", program_fd, netns_fd, _ATTACH_SK_LOOKUP, 0))
        undo.pop_all()
        return LoopbackListener(sockets, link_fd)


def _listen(undo: contextlib.ExitStack) -> tuple[socket.socket, ...]:
    """IPv4 first. Loopback may not be up yet, hence FREEBIND: nothing from elsewhere may ever reach these ports."""
    found = []
    for family, address, level, option in (
        (socket.AF_INET, LOOPBACK, socket.IPPROTO_IP, _IP_FREEBIND),
        (socket.AF_INET6, LOOPBACK6, socket.IPPROTO_IPV6, _IPV6_FREEBIND),
    ):
        try:
            listener = undo.enter_context(socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
            listener.setsockopt(level, option, 1)
            listener.bind((address, 0))
            listener.listen(BACKLOG)
        except OSError:
            if family == socket.AF_INET:
                raise
            continue  # a host without IPv6
        found.append(listener)
    return tuple(found)


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
    return _bpf(_PROG_LOAD, head + no_log + struct.pack("=16sII", b"katapod_loopback"[:15], 0, _ATTACH_SK_LOOKUP))


def _program(map_fd: int) -> bytes:
    """The program for `struct bpf_sk_lookup *` in r1: a TCP connection to a loopback address gets the map's socket of
    its family; everything else, and a family without a socket, is looked up as usual."""
    one = int.from_bytes(b"\0\0\0\1", sys.byteorder)
    code = _Code()
    code.add(_MOVE, to=6, of=1)
    code.add(_LOAD_WORD, to=2, of=6, offset=_PROTOCOL)
    code.jump(_JUMP_NOT_EQUAL, 2, socket.IPPROTO_TCP, "pass")
    code.add(_LOAD_WORD, to=2, of=6, offset=_FAMILY)
    code.jump(_JUMP_EQUAL, 2, socket.AF_INET, "ipv4")
    code.jump(_JUMP_NOT_EQUAL, 2, socket.AF_INET6, "pass")
    for word, value in enumerate((0, 0, 0, one)):
        code.add(_LOAD_WORD, to=2, of=6, offset=_LOCAL_IP6 + 4 * word)
        code.jump(_JUMP_NOT_EQUAL, 2, value, "pass")
    code.add(_MOVE_IMM, to=7, value=1)
    code.jump(_JUMP, 0, 0, "assign")
    code.label("ipv4")
    code.add(_LOAD_BYTE, to=2, of=6, offset=_LOCAL_IP4)
    code.jump(_JUMP_NOT_EQUAL, 2, 127, "pass")
    code.add(_MOVE_IMM, to=7, value=0)
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
