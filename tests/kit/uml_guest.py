"""A real kernel of User-mode Linux with an initrd of a shell script: guests for tests of its devices."""

import asyncio
import contextlib
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest

from katapod.host.regset import preload

__all__ = ["BUSYBOX", "KERNEL", "MODULES", "UmlGuest", "make_initrd", "needs_uml", "running_guest"]

KERNEL = Path("/usr/bin/linux.uml")
BUSYBOX = Path("/bin/busybox")
MODULES = Path("/usr/lib/uml/modules")
CONSOLE_MODULES = ("drivers/char/virtio_console.ko",)
SHARE_MODULES = ("fs/fuse/fuse.ko", "fs/fuse/virtiofs.ko")
LIMIT_S = 180.0

needs_uml = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not KERNEL.exists(), reason="needs the package user-mode-linux"),
    pytest.mark.skipif(not BUSYBOX.exists(), reason="needs the package busybox-static"),
]

PREAMBLE = """#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
"""
APPLETS = ("sh", "cat", "cp", "dd", "echo", "insmod", "ls", "md5sum", "mount", "poweroff", "rmmod", "sleep", "usleep")


def make_initrd(path: Path, script: str) -> None:
    """A cpio archive ("newc", Linux' Documentation/driver-api/early-userspace/buffer-format) with busybox and modules;
    `script` is process 1, once the usual file systems are mounted."""
    entries: list[tuple[str, int, bytes]] = [
        *((name, 0o40755, b"") for name in ("bin", "dev", "mnt", "proc", "sys")),
        ("bin/busybox", 0o100755, BUSYBOX.read_bytes()),
        *((f"bin/{name}", 0o120777, b"busybox") for name in APPLETS),
        ("init", 0o100755, (PREAMBLE + script).encode()),
    ]
    (tree,) = MODULES.glob("*/kernel")
    entries += [(Path(name).name, 0o100644, (tree / name).read_bytes()) for name in CONSOLE_MODULES + SHARE_MODULES]
    with path.open("wb") as file:
        for number, (name, mode, content) in enumerate([*entries, ("TRAILER!!!", 0, b"")], start=1):
            fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
            header = b"070701" + b"".join(b"%08x" % value for value in fields) + name.encode() + b"\0"
            file.write(header + bytes(-len(header) % 4) + content + bytes(-len(content) % 4))


class UmlGuest:
    """`said`: the lines of its console so far."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.said: list[str] = []
        self._news = asyncio.Condition()

    async def follow(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            async with self._news:
                self.said.append(line.decode(errors="replace").strip())
                self._news.notify_all()

    async def says(self, words: str) -> None:
        """Wait for a line with these words."""
        await self._until(lambda: any(words in line for line in self.said))

    async def _until(self, condition: Callable[[], bool]) -> None:
        try:
            async with asyncio.timeout(LIMIT_S), self._news:
                await self._news.wait_for(condition)
        except TimeoutError as exc:
            raise AssertionError("\n".join(self.said)) from exc

    def kill(self) -> None:
        """SIGKILL, to its helpers too."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()


@contextlib.asynccontextmanager
async def running_guest(directory: Path, script: str, devices: Sequence[tuple[Path, int]]) -> AsyncIterator[UmlGuest]:
    """Boot it with virtio devices: where each one's back end listens, and of which kind it is.

    It is process 1 of a PID namespace, with which its helpers end.
    """
    make_initrd(directory / "initrd", script)
    cpus = sorted(os.sched_getaffinity(0))
    process = await asyncio.create_subprocess_exec(
        *("unshare", "--pid", "--fork", "--kill-child", "taskset", "-c", str(cpus[os.getpid() % len(cpus)])),
        *(str(KERNEL), "mem=128M", f"initrd={directory / 'initrd'}", "con=null", "con0=null,fd:1", "quiet", "panic=1"),
        *("lpj=30613504", "initcall_blacklist=raid6_select_algo,calibrate_xor_blocks,init_hostfs"),
        *(f"virtio_uml.device={path}:{kind}" for path, kind in devices),
        env={"HOME": str(directory), "TMPDIR": "/dev/shm", "PATH": os.environ["PATH"], **preload()},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    guest = UmlGuest(process)
    following = asyncio.create_task(guest.follow())
    try:
        yield guest
    finally:
        guest.kill()
        await process.wait()
        await following
