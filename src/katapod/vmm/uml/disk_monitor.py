"""What is asked of a qemu-storage-daemon that runs, by the one monitor that it has: a socket pair.

The guest may have taken the daemon over: what it answers is bounded, and nothing but errors is used of it.
Source: QEMU's docs/interop/qmp-spec, qemu-storage-daemon-qmp-ref(7).
"""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator

from katapod.vmm.errors import VmmLinkBroken, VmmRefused

__all__ = ["DiskMonitor", "monitored"]

LINE_MAX = 65536
LINES_MAX = 64  # events beside an answer
LIMIT_S = 10.0
TEXT_MAX = 300


class DiskMonitor:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._turn = asyncio.Lock()
        self._greeted = False

    async def greet(self) -> None:
        """Returns once the daemon serves what it was told to: it listens only then. Raises VmmLinkBroken."""
        await self._ask("query-version", {})

    async def resize(self, node: str, size: int) -> None:
        """Have it see that the file or device of a node has `size` bytes. Raises VmmRefused, VmmLinkBroken."""
        await self._ask("block_resize", {"node-name": node, "size": size})

    async def _ask(self, command: str, arguments: dict[str, object]) -> None:
        async with self._turn:
            try:
                async with asyncio.timeout(LIMIT_S):
                    if not self._greeted:
                        await self._exchange("qmp_capabilities", {})
                        self._greeted = True
                    await self._exchange(command, arguments)
            except TimeoutError as exc:
                raise VmmLinkBroken(f"cannot ask qemu-storage-daemon: no answer within {LIMIT_S:g} s") from exc
            except (OSError, ValueError) as exc:
                raise VmmLinkBroken(f"cannot ask qemu-storage-daemon: {exc}") from exc

    async def _exchange(self, command: str, arguments: dict[str, object]) -> None:
        self._writer.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        await self._writer.drain()
        for _ in range(LINES_MAX):
            line = await self._reader.readline()
            answer = json.loads(line) if line else None
            if not isinstance(answer, dict):
                raise ValueError("it has hung up, or says what is no answer")
            if "error" in answer:
                raise VmmRefused(f"qemu-storage-daemon refused {command}: {json.dumps(answer['error'])[:TEXT_MAX]}")
            if "return" in answer:
                return
        raise ValueError("it does not answer")


@contextlib.asynccontextmanager
async def monitored(sock: socket.socket) -> AsyncIterator[DiskMonitor]:
    """`sock` is ours from now on."""
    reader, writer = await asyncio.open_unix_connection(sock=sock, limit=LINE_MAX)
    try:
        yield DiskMonitor(reader, writer)
    finally:
        writer.transport.abort()
