"""The management console of a User-mode Linux kernel: one request and its answer at a time, by datagrams.

It listens at a path of its jail, which a hostile guest can turn into anything: no link is followed there, and answers
are data of a bounded length. They go to an abstract address in the kernel's network namespace, the one place that both
ends can name. Source: the kernel's arch/um/drivers/mconsole.h.
"""

import asyncio
import contextlib
import os
import socket
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

from katapod.host.netns import in_netns
from katapod.vmm.errors import VmmLinkBroken, VmmRefused

__all__ = ["Mconsole", "decode_reply", "encode_request"]

MAGIC, VERSION = 0xCAFEBABE, 2
DATA_MAX = 512
_REQUEST = struct.Struct(f"=III{DATA_MAX}s")  # magic, version, length
_REPLY = struct.Struct("=III")  # error, whether more follow, length with a NUL at the end
REPLIES_MAX = 16
LIMIT_S = 20.0  # as for a QEMU: a busy host lets the kernel wait for a CPU


def encode_request(command: str) -> bytes:
    """Raises ValueError if it is too long."""
    data = command.encode()
    if len(data) >= DATA_MAX:
        raise ValueError(f"a command of mconsole has less than {DATA_MAX} bytes")
    return _REQUEST.pack(MAGIC, VERSION, len(data), data)


def decode_reply(datagram: bytes) -> tuple[bool, bool, str]:
    """Whether it is a refusal, whether more follow, and the text. Raises ValueError."""
    if len(datagram) < _REPLY.size or len(datagram) > _REPLY.size + DATA_MAX:
        raise ValueError(f"a reply of {len(datagram)} bytes")
    error, more, length = _REPLY.unpack_from(datagram)
    if length > len(datagram) - _REPLY.size:
        raise ValueError(f"a reply that claims {length} bytes")
    text = datagram[_REPLY.size : _REPLY.size + length].rstrip(b"\0").decode(errors="replace")
    return bool(error), bool(more), text


class Mconsole:
    """Of the kernel in process `pid`, at `path` of its root directory."""

    def __init__(self, pid: int, path: Path) -> None:
        self._pid = pid
        self._path = path
        self._turn = asyncio.Lock()

    async def ask(self, command: str, limit_s: float = LIMIT_S) -> str:
        """Raises VmmRefused with the kernel's words, VmmLinkBroken."""
        async with self._turn:
            try:
                async with asyncio.timeout(limit_s):
                    return await self._exchange(command)
            except TimeoutError as exc:
                raise VmmLinkBroken(f"cannot ask the kernel for {command!r}: no answer within {limit_s:g} s") from exc
            except (OSError, ValueError) as exc:
                raise VmmLinkBroken(f"cannot ask the kernel for {command!r}: {exc}") from exc

    async def _exchange(self, command: str) -> str:
        loop = asyncio.get_running_loop()
        with in_netns(Path(f"/proc/{self._pid}/ns/net"), _reply_socket) as sock, self._socket_path() as address:
            sock.sendto(encode_request(command), address)
            text = ""
            for _ in range(REPLIES_MAX):
                refused, more, part = decode_reply(await loop.sock_recv(sock, _REPLY.size + DATA_MAX + 1))
                text += part
                if refused:
                    raise VmmRefused(f"the kernel refused {command!r}: {text.strip() or 'without a word'}")
                if not more:
                    return text
        raise ValueError("replies without an end")

    @contextlib.contextmanager
    def _socket_path(self) -> Iterator[str]:
        """A name for the socket while the block runs. Raises OSError, ValueError."""
        with contextlib.ExitStack() as stack:
            fd = os.open(f"/proc/{self._pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            *directories, name = self._path.parts[1:]
            for directory in directories:
                fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
                stack.callback(os.close, fd)
            fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            stack.callback(os.close, fd)
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                raise ValueError(f"{self._path} is no socket")
            yield f"/proc/self/fd/{fd}"


def _reply_socket() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.bind("")  # the kernel chooses an abstract address: unix(7)
    except OSError:
        sock.close()
        raise
    return sock
