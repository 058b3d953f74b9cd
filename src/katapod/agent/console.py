"""The debug console: a shell in the guest for the person who runs it, only with agent.debug_console."""

from __future__ import annotations

import errno
import os

from katapod.agent import channel, log
from katapod.agent.loop import Loop, Tasks
from katapod.agent.program import ENVIRONMENT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from katapod.agent.options import Options

__all__ = ["serve"]

SHELLS = (("/bin/bash", "bash"), ("/bin/sh", "sh"), ("/bin/busybox", "sh"))
CHUNK = 65536


async def serve(loop: Loop, options: Options, port_name: str) -> None:
    """Serve shells on the virtio-serial port `port_name` if there is one, else on vsock, for ever."""

    async def shell(stream: channel.Stream) -> bool:
        await _run_shell(loop, stream)
        return True

    path = channel.find_port(port_name)
    try:
        if path is not None:
            await channel.serve_port(loop, path, shell, lambda: None)
        else:
            listener = channel.Listener(loop, f"vsock://-1:{options.debug_console_vport}")
            await channel.listen(loop, listener, shell)
    except OSError as exc:
        log.warning(f"there is no debug console: {exc}")


def _start_shell() -> tuple[int, int]:
    """(process id, master of its terminal). The child has a session of its own. Raises OSError."""
    found = [entry for entry in SHELLS if os.access(entry[0], os.X_OK)]
    if not found:
        raise OSError(errno.ENOENT, "the guest image has no shell")
    path, name = found[0]
    pid, master = os.forkpty()
    if pid == 0:
        try:
            os.chdir("/")
            os.execve(path, [name], ENVIRONMENT | {"TERM": "vt100"})  # noqa: S606 - no shell but the asked one
        finally:
            os._exit(127)
    os.set_blocking(master, False)
    os.set_inheritable(master, False)
    return pid, master


async def _run_shell(loop: Loop, stream: channel.Stream) -> None:
    pid, master = _start_shell()
    ended = loop.child_exit(pid)
    tasks = Tasks(loop, "console")

    async def to_host() -> None:
        while True:
            try:
                data = os.read(master, CHUNK)
            except BlockingIOError:
                await loop.readable(master)
                continue
            except OSError:
                return  # EIO: the shell has gone
            await stream.write(data)

    async def from_host() -> None:
        while True:
            try:
                data = memoryview(await stream.read())
            except OSError:
                return
            if not data:
                return
            while data:
                try:
                    data = data[os.write(master, data) :]
                except BlockingIOError:
                    await loop.writable(master)

    try:
        sides = [tasks.spawn("out", to_host()), tasks.spawn("in", from_host())]
        await loop.wait_any([*sides, ended])
    finally:
        tasks.cancel()
        if not ended.done:
            os.kill(pid, 1)
        loop.close_fd(master)
