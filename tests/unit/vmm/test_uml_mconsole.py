"""The management console: what goes over the wire, and what a hostile kernel answers."""

import asyncio
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from katapod.vmm.errors import VmmLinkBroken, VmmRefused
from katapod.vmm.uml import mconsole
from katapod.vmm.uml.mconsole import Mconsole, decode_reply, encode_request


def reply(text: str, *, error: int = 0, more: int = 0, length: int | None = None) -> bytes:
    data = text.encode() + b"\0"
    return struct.pack("=III", error, more, len(data) if length is None else length) + data


def test_a_request_has_the_form_of_the_kernels_header() -> None:
    request = encode_request("version")
    assert len(request) == 12 + 512
    assert request[:12] == struct.pack("=III", 0xCAFEBABE, 2, 7)
    assert request[12:].rstrip(b"\0") == b"version"
    with pytest.raises(ValueError, match="less than 512 bytes"):
        encode_request("x" * 512)


def test_replies() -> None:
    assert decode_reply(reply("stopped")) == (False, False, "stopped")
    assert decode_reply(reply("no such thing", error=1, more=1)) == (True, True, "no such thing")


@pytest.mark.parametrize("data", [b"", b"x" * 11, reply("x", length=3), reply("x", length=2**32 - 1), b"\0" * 600])
def test_what_is_no_reply(data: bytes) -> None:
    with pytest.raises(ValueError, match="reply"):
        decode_reply(data)


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Mconsole]]:
    """A kernel in this process, which answers each request with all of `replies`."""
    monkeypatch.setattr(mconsole, "in_netns", lambda path, work: work())  # of its own: needs root
    ask = Mconsole.ask
    monkeypatch.setattr(Mconsole, "ask", lambda self, command, limit_s=60.0: ask(self, command, limit_s))
    threads: list[threading.Thread] = []
    sockets: list[socket.socket] = []

    def serve(*replies: bytes) -> Mconsole:
        path = tmp_path / "mconsole"
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        sock.bind(str(path))
        sockets.append(sock)

        def answer() -> None:
            data, sender = sock.recvfrom(4096)
            if data:
                for each in replies:
                    sock.sendto(each, sender)

        threads.append(threading.Thread(target=answer))
        threads[-1].start()
        return Mconsole(os.getpid(), path)

    yield serve
    for sock, thread in zip(sockets, threads, strict=True):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as waking:
            waking.sendto(b"", str(tmp_path / "mconsole")) if thread.is_alive() else None
        thread.join()
        sock.close()


async def test_an_answer_in_parts(kernel: Callable[..., Mconsole]) -> None:
    assert await kernel(reply("one, ", more=1), reply("two")).ask("version") == "one, two"


async def test_a_refusal_has_the_kernels_words(kernel: Callable[..., Mconsole]) -> None:
    with pytest.raises(VmmRefused, match="the kernel refused 'stop': busy"):
        await kernel(reply("busy", error=1)).ask("stop")


async def test_replies_without_an_end_are_broken_off(kernel: Callable[..., Mconsole]) -> None:
    with pytest.raises(VmmLinkBroken, match="replies without an end"):
        await kernel(*[reply("x", more=1)] * mconsole.REPLIES_MAX).ask("version")


async def test_a_kernel_that_says_nothing(kernel: Callable[..., Mconsole]) -> None:
    with pytest.raises(VmmLinkBroken, match="no answer within"):
        await kernel().ask("version", 0.05)


async def test_no_link_is_followed_and_nothing_but_a_socket_asked(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as elsewhere:
        elsewhere.bind(str(tmp_path / "elsewhere"))
        (tmp_path / "mconsole").symlink_to("elsewhere")
        (tmp_path / "file").touch()
        (tmp_path / "d").symlink_to(".")
        for name in ("mconsole", "file", "d/elsewhere", "none"):
            with pytest.raises((OSError, ValueError)), Mconsole(os.getpid(), tmp_path / name)._socket_path():
                pass
        elsewhere.setblocking(False)
        with pytest.raises(BlockingIOError):
            elsewhere.recv(1)
    await asyncio.sleep(0)
