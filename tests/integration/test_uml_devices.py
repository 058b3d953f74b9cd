"""The vhost-user devices before a real kernel of User-mode Linux: a console with ports, and a share by virtiofsd."""

import asyncio
import hashlib
import os
import random
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from vm_helper import DIALECT, VIRTIOFSD, resources

from katapod.host.removal import remove_tree
from katapod.host.virtiofsd import running_virtiofsd
from katapod.plan.virtiofsd import VirtiofsdPlan
from katapod.vmm.uml.console_device import CONSOLE_ID, Console, serving_console
from katapod.vmm.uml.share_device import SHARE_ID, joining_share
from kit.uml_guest import UmlGuest, needs_uml, running_guest

pytestmark = needs_uml
LIMIT_S = 180.0
PORTS = """
insmod /virtio_console.ko
until [ "$(cat /sys/class/virtio-ports/vport0p1/name)" = two ]; do usleep 10000; done
"""
ECHO = PORTS + "(exec 3<>/dev/vport0p1; cat <&3 >&3) & exec 3<>/dev/vport0p0; cat <&3 >&3; echo over; sleep 1000"


@pytest.fixture
def room() -> Iterator[Path]:
    """Short: socket paths have 107 bytes."""
    directory = Path(tempfile.mkdtemp(prefix="ku-", dir="/dev/shm"))
    yield directory
    remove_tree(directory)


def listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(1)
    return listener


def pair() -> tuple[socket.socket, socket.socket]:
    near, far = socket.socketpair()
    near.setblocking(False)
    return near, far


class Machine:
    """A guest with a console of two ports; `one` and `two` are their hosts' ends."""

    console: Console
    guest: UmlGuest

    def __init__(self) -> None:
        (self.one, self._one_far), (self.two, self._two_far) = pair(), pair()
        self._stack = AsyncExitStack()

    async def boot(self, room: Path, script: str) -> None:
        ports = {"one": self._one_far, "two": self._two_far}
        self.console = await self._stack.enter_async_context(serving_console(listen(room / "c"), ports))
        self.guest = await self._stack.enter_async_context(running_guest(room, script, [(room / "c", CONSOLE_ID)]))

    async def __aenter__(self) -> "Machine":
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()
        self.one.close()
        self.two.close()


async def receive(sock: socket.socket, size: int) -> bytes:
    """So much, or all until the end."""
    data = bytearray()
    async with asyncio.timeout(LIMIT_S):
        while len(data) < size and (piece := await asyncio.get_running_loop().sock_recv(sock, 1 << 18)):
            data += piece
    return bytes(data)


async def send(sock: socket.socket, data: bytes) -> None:
    async with asyncio.timeout(LIMIT_S):
        await asyncio.get_running_loop().sock_sendall(sock, data)


async def test_what_is_sent_on_two_ports_at_once_comes_back(room: Path) -> None:
    contents = [random.Random(seed).randbytes(8 << 20) for seed in (1, 2)]
    async with Machine() as machine:
        await machine.boot(room, ECHO)
        await send(machine.one, b"first")  # before the guest has its port
        assert await receive(machine.one, 5) == b"first"
        one, two, _, _ = await asyncio.gather(
            receive(machine.one, 8 << 20),
            receive(machine.two, 8 << 20),
            send(machine.one, contents[0]),
            send(machine.two, contents[1]),
        )
        assert [hashlib.md5(each).digest() for each in (one, two)] == [hashlib.md5(each).digest() for each in contents]


async def test_a_host_that_goes_and_another_that_comes(room: Path) -> None:
    script = PORTS + "exec 3<>/dev/vport0p0; cat <&3; echo; echo gone; until [ -e /dev/none ]; do cat <&3 >&3; done"
    async with Machine() as machine:
        await machine.boot(room, script)
        await send(machine.one, b"last words")
        machine.one.close()
        await machine.guest.says("last words")
        await machine.guest.says("gone")
        machine.one, far = pair()
        machine.console.connect("one", far)
        await send(machine.one, b"another")
        assert await receive(machine.one, 7) == b"another"


async def test_a_guest_that_closes_its_end(room: Path) -> None:
    async with Machine() as machine:
        await machine.boot(room, PORTS + "dd if=/dev/zero of=/dev/vport0p0 bs=64k count=128; echo written; sleep 1000")
        await machine.guest.says("128+0 records out")  # in the rings, or here
        assert await receive(machine.one, 1 << 30) == bytes(8 << 20)
        await send(machine.two, b"still there")


async def test_a_host_that_does_not_read_stalls_the_writer_and_loses_nothing(room: Path) -> None:
    script = (
        PORTS + "(exec 3<>/dev/vport0p1; cat <&3 >&3) & dd if=/dev/zero of=/dev/vport0p0 bs=64k count=512; sleep 1000"
    )
    async with Machine() as machine:
        await machine.boot(room, script)
        await send(machine.two, b"x" * 100_000)
        assert await receive(machine.two, 100_000) == b"x" * 100_000
        assert not any("records out" in line for line in machine.guest.said)
        assert await receive(machine.one, 1 << 30) == bytes(32 << 20)


async def test_a_driver_that_is_loaded_again(room: Path) -> None:
    script = PORTS + "echo started; rmmod virtio_console; echo removed; " + ECHO
    async with Machine() as machine:
        await machine.boot(room, script)
        await machine.guest.says("removed")
        await send(machine.one, b"again")
        assert await receive(machine.one, 5) == b"again"
        assert machine.console.failure is None


@pytest.mark.parametrize("way", ["poweroff", "SIGKILL"])
async def test_the_hosts_see_the_guest_s_end(room: Path, way: str) -> None:
    before = resources()
    async with Machine() as machine:
        await machine.boot(room, PORTS + "cat /dev/vport0p0; poweroff -f")
        if way == "SIGKILL":
            await send(machine.one, b"hello\n")
            await machine.guest.says("hello")
            machine.guest.kill()
        else:
            machine.one.shutdown(socket.SHUT_WR)
        assert await receive(machine.one, 1) == b""
        assert await receive(machine.two, 1) == b""
        async with asyncio.timeout(LIMIT_S):
            await machine.console.ended.wait()
        assert machine.console.failure is None
    await asyncio.sleep(0)
    assert resources() == before


SHARE = """
insmod /fuse.ko; insmod /virtiofs.ko
mount -t virtiofs kataShared /mnt || echo failed
"""


@pytest.mark.skipif(not Path(VIRTIOFSD).exists(), reason="needs virtiofsd")
async def test_files_go_both_ways(room: Path) -> None:
    share = room / "share"
    share.mkdir()
    content = random.Random(3).randbytes(3 << 20)
    (share / "from-host").write_bytes(content)
    plan = VirtiofsdPlan(VIRTIOFSD, DIALECT, share, "auto")
    script = SHARE + "md5sum /mnt/from-host; cp /mnt/from-host /mnt/from-guest; echo copied; poweroff -f"
    async with (
        running_virtiofsd(plan, room / "v", room / "log") as daemon,
        joining_share(listen(room / "s"), room / "v", "kataShared") as joined,
        running_guest(room, script, [(room / "s", SHARE_ID)]) as guest,
    ):
        await guest.says("copied")
        assert any(hashlib.md5(content).hexdigest() in line for line in guest.said)
        assert (share / "from-guest").read_bytes() == content
        async with asyncio.timeout(LIMIT_S):
            assert await daemon.wait_end() == "exit status 0"
            await joined.ended.wait()
        assert joined.failure is None


@pytest.mark.skipif(not Path(VIRTIOFSD).exists(), reason="needs virtiofsd")
async def test_a_guest_is_told_of_the_end_of_virtiofsd(room: Path) -> None:
    """What it asks for from then on is refused. A request that was under way has no answer, ever: Linux' limit."""
    share = room / "share"
    share.mkdir()
    plan = VirtiofsdPlan(VIRTIOFSD, DIALECT, share, "never")
    wait = "insmod /virtio_console.ko; until [ -e /dev/vport0p0 ]; do usleep 10000; done; "
    script = SHARE + wait + "ls /mnt; echo mounted; cat /dev/vport0p0; ls /mnt || echo refused; sleep 1000"
    near, far = pair()
    devices = [(room / "c", CONSOLE_ID), (room / "s", SHARE_ID)]
    async with (
        running_virtiofsd(plan, room / "v", room / "log") as daemon,
        joining_share(listen(room / "s"), room / "v", "kataShared") as joined,
        serving_console(listen(room / "c"), {"one": far}),
        running_guest(room, script, devices) as guest,
    ):
        await guest.says("mounted")
        os.kill(daemon.child.process.pid, signal.SIGKILL)
        async with asyncio.timeout(LIMIT_S):
            await joined.ended.wait()
        near.close()
        await guest.says("refused")
