"""Exec, attach and port-forward of the CRI: the URLs that containerd answers with, used over WebSocket.

Every message begins with the number of its channel; v4.channel.k8s.io of Kubernetes' remote command protocol has
0 stdin, 1 stdout, 2 stderr, 3 the result as a JSON Status, 4 the size of the terminal. Of a forwarded port, 0 is its
data and 1 its errors, and the first message of each is the port's number in two bytes.
"""

import contextlib
import ctypes
import json
import os
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
from websockets.typing import Subprotocol

__all__ = ["DATA", "ERROR", "Stream", "Tunnel", "connect_inside", "open_stream", "open_tunnel"]

STDIN, STDOUT, STDERR, RESULT, SIZE = range(5)
DATA, ERROR = range(2)
PROTOCOL = Subprotocol("v4.channel.k8s.io")
CLONE_NEWNET = 0x40000000
LIMIT_S = 180.0


class Stream:
    """A process whose streams are on the other end."""

    def __init__(self, url: str, netns: str) -> None:
        address = urlsplit(url)
        assert address.hostname is not None
        assert address.port is not None
        self._closing = contextlib.ExitStack()
        opened = connect(
            url.replace("http://", "ws://", 1),
            sock=connect_inside(netns, address.hostname, address.port),
            subprotocols=[PROTOCOL],
            compression=None,
            proxy=None,
            ping_interval=None,
            max_size=None,
        )
        self._peer = self._closing.enter_context(opened)
        self.received: dict[int, bytes] = {STDOUT: b"", STDERR: b"", RESULT: b""}
        self._read_to = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.close()

    def send(self, data: bytes, channel: int = STDIN) -> None:
        self._peer.send(bytes([channel]) + data)

    def resize(self, columns: int, rows: int) -> None:
        self.send(json.dumps({"Width": columns, "Height": rows}).encode(), SIZE)

    def expect(self, pattern: bytes, limit_s: float = LIMIT_S, channel: int = STDOUT) -> re.Match[bytes]:
        """Read on until `pattern` comes in what has not been matched yet."""
        deadline = time.monotonic() + limit_s
        while True:
            if found := re.compile(pattern, re.DOTALL).search(self.received[channel], self._read_to):
                self._read_to = found.end()
                return found
            if not self._read(deadline - time.monotonic()):
                raise AssertionError(f"{pattern!r} does not come; it said {self.received}")

    def finish(self, limit_s: float = LIMIT_S) -> int:
        """Read on to the end; returns the exit status."""
        deadline = time.monotonic() + limit_s
        while self._read(deadline - time.monotonic()):
            pass
        assert self.received[RESULT], f"it ended without a result; it said {self.received}"
        result = json.loads(self.received[RESULT])
        if result["status"] == "Success":
            return 0
        causes = result.get("details", {}).get("causes", [])
        codes = [int(cause["message"]) for cause in causes if cause["reason"] == "ExitCode"]
        assert codes, f"it failed: {result}"
        return codes[0]

    def _read(self, limit_s: float) -> bool:
        """Take in one message; false at the end. Raises TimeoutError."""
        try:
            message = self._peer.recv(timeout=max(limit_s, 0))
        except ConnectionClosed:
            return False
        except TimeoutError:
            raise AssertionError(f"nothing more comes; it said {self.received}") from None
        assert isinstance(message, bytes)
        if message:
            self.received[message[0]] = self.received.get(message[0], b"") + message[1:]
        return True


def open_stream(url: str, netns: str) -> Stream:
    """The streams of an Exec or Attach, whose server listens on the loopback of the network namespace `netns`."""
    return Stream(url, netns)


class Tunnel(Stream):
    """A connection to a port of a pod, by containerd."""

    def __init__(self, url: str, netns: str, port: int) -> None:
        super().__init__(f"{url}?port={port}", netns)
        self.received = {DATA: b"", ERROR: b""}
        number = port.to_bytes(2, "little")
        for channel in (DATA, ERROR):
            self.expect(re.escape(number), channel=channel)
            self._read_to = 0
        self.received = {channel: data.removeprefix(number) for channel, data in self.received.items()}


def open_tunnel(url: str, netns: str, port: int) -> Tunnel:
    """The connection of a PortForward to one of its ports; `netns` is that of containerd."""
    return Tunnel(url, netns, port)


def connect_inside(netns: str, host: str, port: int) -> socket.socket:
    """A TCP connection made in a network namespace: a socket stays where it was opened."""

    def work() -> socket.socket:
        libc = ctypes.CDLL(None, use_errno=True)
        fd = os.open(Path("/run/netns") / netns, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if libc.setns(fd, CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {netns}")
        finally:
            os.close(fd)
        return socket.create_connection((host, port), timeout=LIMIT_S)

    with ThreadPoolExecutor(1, thread_name_prefix=f"in {netns}") as executor:  # the thread ends, and takes setns along
        return executor.submit(work).result()
