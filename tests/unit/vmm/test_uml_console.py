"""The virtio console of User-mode Linux, before a front end with real rings."""

import asyncio
import gc
import os
import random
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from katapod.vmm.uml.console_device import Console, serving_console
from kit.vhost_driver import GUEST, INDIRECT, PORT_OPEN, PORT_READY, SIZE, WRITE, FrontEnd, GuestConsole, guest_console

LIMIT_S = 60.0
AGENT, SHELL = "katapod.agent.0", "katapod.console.0"


class Hosts:
    """A console with two ports; `agent` and `shell` are what the host holds of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(path))
        self.listener.listen(1)
        self.agent, self.agent_far = self.pair()
        self.shell, self.shell_far = self.pair()
        self.console: Console

    def pair(self) -> tuple[socket.socket, socket.socket]:
        near, far = socket.socketpair()
        near.setblocking(False)
        return near, far

    async def receive(self, sock: socket.socket, size: int) -> bytes:
        data = b""
        async with asyncio.timeout(LIMIT_S):
            while len(data) < size and (piece := await asyncio.get_running_loop().sock_recv(sock, size - len(data))):
                data += piece
        return data

    async def send(self, sock: socket.socket, data: bytes) -> None:
        async with asyncio.timeout(LIMIT_S):
            await asyncio.get_running_loop().sock_sendall(sock, data)

    def close(self) -> None:
        self.agent.close()
        self.shell.close()


@pytest.fixture
async def hosts(tmp_path: Path) -> AsyncIterator[Hosts]:
    hosts = Hosts(tmp_path / "console.sock")
    async with serving_console(hosts.listener, {AGENT: hosts.agent_far, SHELL: hosts.shell_far}) as hosts.console:
        yield hosts
    hosts.close()


@pytest.fixture
async def guest(hosts: Hosts) -> AsyncIterator[GuestConsole]:
    async with guest_console(hosts.path, 2) as guest:
        yield guest


async def test_the_guest_finds_its_ports_by_name(guest: GuestConsole) -> None:
    assert all(port.host_is_here for port in guest.ports)
    assert [port.name for port in guest.ports] == [AGENT, SHELL]


async def test_the_configuration_is_read_byte_by_byte(hosts: Hosts) -> None:
    """As Linux does: each byte with all that stand before it."""
    front_end = await FrontEnd.connect(hosts.path)
    try:
        await front_end.negotiate(1 << 32 | 1 << 1)
        read = b""
        for offset in range(4, 8):
            size = offset + 1
            answer = await front_end.ask(24, struct.pack("<III", 0, size, 0) + bytes(size))
            assert struct.unpack_from("<III", answer) == (0, size, 0)
            assert len(answer) == 12 + size
            read += answer[-1:]
        assert read == struct.pack("<I", 2)
    finally:
        front_end.close()


async def test_what_the_host_said_first_waits_for_the_guest(hosts: Hosts, guest: GuestConsole) -> None:
    await hosts.send(hosts.agent, b"hello")
    assert not guest.ports[0].incoming.take_used()
    await guest.open(0)
    assert await guest.read(0) == b"hello"


async def test_all_directions_at_once(hosts: Hosts, guest: GuestConsole) -> None:
    """Megabytes each way on both ports: all of it, in order, on the right port."""
    contents = {name: random.Random(name).randbytes(3 << 20) for name in ("a-in", "a-out", "s-in", "s-out")}
    await guest.open(0)
    await guest.open(1)
    results = await asyncio.gather(
        hosts.receive(hosts.agent, 3 << 20),
        guest.read_exactly(0, 3 << 20),
        hosts.receive(hosts.shell, 3 << 20),
        guest.read_exactly(1, 3 << 20),
        guest.write(0, contents["a-out"]),
        hosts.send(hosts.agent, contents["a-in"]),
        guest.write(1, contents["s-out"]),
        hosts.send(hosts.shell, contents["s-in"]),
    )
    assert results[0] == contents["a-out"]
    assert results[1] == contents["a-in"]
    assert results[2] == contents["s-out"]
    assert results[3] == contents["s-in"]


async def test_a_host_that_does_not_read_stalls_the_guest_s_writer_only(hosts: Hosts, guest: GuestConsole) -> None:
    data = random.Random(1).randbytes(6 << 20)
    await guest.open(0)
    await guest.open(1)
    writing = asyncio.create_task(guest.write(0, data))
    await hosts.send(hosts.shell, b"x" * 100_000)
    assert await guest.read_exactly(1, 100_000) == b"x" * 100_000
    await guest.until(lambda: len(guest.ports[0].outgoing.chains) == 64)
    assert not writing.done()
    assert await hosts.receive(hosts.agent, len(data)) == data
    await writing


async def test_a_buffer_is_given_back_once_all_its_bytes_were_taken(hosts: Hosts, guest: GuestConsole) -> None:
    hosts.agent_far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
    await guest.open(0)
    await guest.write(0, b"z" * 32768)
    await guest.until(lambda: socket_holds(hosts.agent) > 0)
    held = socket_holds(hosts.agent)
    assert held < 32768
    assert not guest.ports[0].outgoing.take_used()
    assert await hosts.receive(hosts.agent, 32768) == b"z" * 32768
    assert len(await guest.ports[0].outgoing.wait_used()) == 1


def socket_holds(sock: socket.socket) -> int:
    try:
        return len(sock.recv(1 << 20, socket.MSG_PEEK))
    except BlockingIOError:
        return 0


async def test_a_guest_that_does_not_read_stalls_the_host_s_writer(hosts: Hosts, guest: GuestConsole) -> None:
    data = random.Random(2).randbytes(4 << 20)
    await guest.open(0)
    writing = asyncio.create_task(hosts.send(hosts.agent, data))
    await guest.until(lambda: not guest.ports[0].incoming.chains or used_index(guest) == 64)
    assert not writing.done()
    assert await guest.read_exactly(0, len(data)) == data
    await writing


def used_index(guest: GuestConsole) -> int:
    queue = guest.ports[0].incoming
    (index,) = struct.unpack_from("<H", guest.front_end.memory, queue.used + 2)
    return int(index)


async def test_the_guest_sees_the_host_go_after_its_last_bytes(hosts: Hosts, guest: GuestConsole) -> None:
    await guest.open(0)
    await hosts.send(hosts.agent, b"last words")
    hosts.agent.close()
    await guest.until(lambda: guest.ports[0].told == [True, False])
    assert await guest.read(0) == b"last words"
    assert guest.ports[1].host_is_here


async def test_another_host_comes(hosts: Hosts, guest: GuestConsole) -> None:
    await guest.open(0)
    hosts.agent.close()
    await guest.until(lambda: guest.ports[0].told == [True, False])
    hosts.agent, far = hosts.pair()
    hosts.console.connect(AGENT, far)
    await guest.until(lambda: guest.ports[0].host_is_here)
    await hosts.send(hosts.agent, b"again")
    assert await guest.read(0) == b"again"
    await guest.write(0, b"yes")
    assert await hosts.receive(hosts.agent, 3) == b"yes"


async def test_a_host_in_place_of_another(hosts: Hosts, guest: GuestConsole) -> None:
    await guest.open(0)
    former = hosts.agent
    hosts.agent, far = hosts.pair()
    hosts.console.connect(AGENT, far)
    assert await hosts.receive(former, 1) == b""
    former.close()
    await guest.until(lambda: guest.ports[0].told == [True, False, True])


async def test_what_is_written_without_a_host_is_dropped(hosts: Hosts, guest: GuestConsole) -> None:
    await guest.open(0)
    hosts.agent.close()
    await guest.until(lambda: not guest.ports[0].host_is_here)
    await guest.write(0, b"y" * (4 << 20))
    hosts.agent, far = hosts.pair()
    while guest.ports[0].outgoing.chains:
        await guest.ports[0].outgoing.wait_used()
    hosts.console.connect(AGENT, far)
    await guest.write(0, b"new")
    assert await hosts.receive(hosts.agent, 3) == b"new"


async def test_the_host_reads_to_the_end_when_the_guest_closes(hosts: Hosts, guest: GuestConsole) -> None:
    """Also what the socket has no room for yet; and what the host sent meanwhile is no reset for it."""
    await guest.open(0)
    await guest.write(0, b"q" * (1 << 20))
    await hosts.send(hosts.agent, b"unread")
    await guest.read(0)
    await guest.close(0)
    await hosts.send(hosts.agent, b"too late")
    assert await hosts.receive(hosts.agent, 2 << 20) == b"q" * (1 << 20)
    await guest.until(lambda: not guest.ports[0].host_is_here)
    assert guest.ports[1].host_is_here


async def test_what_is_written_after_a_close_is_not_for_the_former_host(hosts: Hosts, guest: GuestConsole) -> None:
    await guest.open(0)
    await guest.write(0, b"1" * (1 << 20))
    await guest.close(0)
    await guest.open(0)
    await guest.write(0, b"2" * 100)
    assert await hosts.receive(hosts.agent, 2 << 20) == b"1" * (1 << 20)


async def test_the_host_reads_to_the_end_when_the_guest_dies(hosts: Hosts, guest: GuestConsole) -> None:
    await guest.open(0)
    await guest.write(0, b"q" * (1 << 20))
    guest.front_end.hang_up()
    assert await hosts.receive(hosts.shell, 1) == b""
    assert await hosts.receive(hosts.agent, 2 << 20) == b"q" * (1 << 20)
    async with asyncio.timeout(LIMIT_S):
        await hosts.console.ended.wait()
    assert hosts.console.failure is None


async def test_no_interrupt_where_the_driver_wants_none(hosts: Hosts, guest: GuestConsole) -> None:
    queue = guest.ports[0].outgoing
    await guest.open(0)
    queue.set_flags(1)
    await guest.write(0, b"abc")
    assert await hosts.receive(hosts.agent, 3) == b"abc"
    await guest.until(lambda: bool(queue.take_used()))
    assert not queue.was_interrupted()


async def test_a_driver_that_is_loaded_again(hosts: Hosts, guest: GuestConsole) -> None:
    """It takes back what it has offered, then has the rings stopped, and sets them up anew."""
    await guest.open(0)
    await guest.close(0)
    assert await hosts.receive(hosts.agent, 1) == b""
    for queue in guest.front_end.queues:
        queue.set_index((queue.offered - len(queue.chains)) & 0xFFFF)
        guest.front_end.enable(queue, on=False)
    await guest.front_end.ask(1)
    assert hosts.console.failure is None
    assert await hosts.receive(hosts.shell, 0) == b""


async def test_leaves_nothing(tmp_path: Path) -> None:
    gc.collect()
    before = descriptors()
    guest: GuestConsole | None
    for number in range(3):
        hosts = Hosts(tmp_path / f"{number}.sock")
        async with serving_console(hosts.listener, {AGENT: hosts.agent_far, SHELL: hosts.shell_far}):
            if number:
                async with guest_console(hosts.path, 2) as guest:
                    assert guest is not None
                    await guest.open(0)
                    await hosts.send(hosts.agent, b"hello")
                    await guest.read(0)
                    if number == 2:
                        guest.front_end.hang_up()
        hosts.close()
        guest = None
        gc.collect()  # the guest's own mapping
        assert descriptors() == before


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def ends(hosts: Hosts, why: str) -> None:
    """The console has ended for that reason, and both hosts see it."""
    async with asyncio.timeout(LIMIT_S):
        await hosts.console.ended.wait()
    assert hosts.console.failure is not None
    assert why in str(hosts.console.failure)
    assert await hosts.receive(hosts.agent, 1) == b""
    assert await hosts.receive(hosts.shell, 1) == b""


@pytest.mark.parametrize(
    ("address", "length", "flags", "why"),
    [
        (GUEST - 1, 8, 0, "not in the guest's memory"),
        (GUEST + SIZE - 7, 8, 0, "not in the guest's memory"),
        (2**64 - 4, 8, 0, "not in the guest's memory"),
        (GUEST, 2**32 - 1, 0, "at most 1048576"),
        (GUEST, 8, INDIRECT, "flags 0x4"),
        (GUEST, 8, WRITE, "0 bytes"),
        (GUEST, 9, 0, "9 bytes"),
    ],
)
async def test_a_wrong_descriptor(
    hosts: Hosts, guest: GuestConsole, address: int, length: int, flags: int, why: str
) -> None:
    queue = guest.control_out
    queue.set_descriptor(7, address, length, flags)
    queue.set_available(7)
    queue.kick()
    await ends(hosts, why)


async def test_a_chain_without_an_end(hosts: Hosts, guest: GuestConsole) -> None:
    queue = guest.ports[0].outgoing
    queue.set_descriptor(3, GUEST, 1, 1, 4)
    queue.set_descriptor(4, GUEST, 1, 1, 3)
    queue.set_available(3)
    queue.kick()
    await ends(hosts, "more than the 256 descriptors")


async def test_what_is_read_behind_what_is_written(hosts: Hosts, guest: GuestConsole) -> None:
    queue = guest.ports[0].outgoing
    queue.set_descriptor(3, GUEST, 1, 1 | WRITE, 4)
    queue.set_descriptor(4, GUEST, 1, 0)
    queue.set_available(3)
    queue.kick()
    await ends(hosts, "behind what it writes")


@pytest.mark.parametrize("head", [256, 65535])
async def test_a_head_beyond_the_ring(hosts: Hosts, guest: GuestConsole, head: int) -> None:
    guest.ports[1].outgoing.set_available(head)
    guest.ports[1].outgoing.kick()
    await ends(hosts, f"descriptor {head} of a ring of 256")


async def test_more_chains_than_a_ring_has(hosts: Hosts, guest: GuestConsole) -> None:
    guest.ports[1].outgoing.set_index(20000)
    guest.ports[1].outgoing.kick()
    await ends(hosts, "offers 20000 chains")


async def test_buffers_without_room(hosts: Hosts, guest: GuestConsole) -> None:
    queue = guest.ports[0].incoming
    for index in range(256):
        queue.set_descriptor(index, GUEST, 0, WRITE)
    await hosts.send(hosts.agent, b"hello")
    guest.tell_unheard(0, PORT_OPEN, 1)
    await ends(hosts, "have no room")


async def test_memory_that_is_cut_short(hosts: Hosts, guest: GuestConsole) -> None:
    """A mapping would end the whole process here."""
    await guest.stop_listening()  # which has a mapping
    os.truncate(guest.front_end.file, 4096)
    os.eventfd_write(guest.ports[0].outgoing.kick_fd, 1)
    await ends(hosts, "its file ends")


@pytest.mark.parametrize(("port", "event", "why"), [(2, PORT_OPEN, "port 2"), (2**31, PORT_READY, "port 2147483648")])
async def test_a_port_that_does_not_exist(hosts: Hosts, guest: GuestConsole, port: int, event: int, why: str) -> None:
    guest.tell_unheard(port, event, 1)
    await ends(hosts, why)


async def test_an_unknown_event_is_passed_over(hosts: Hosts, guest: GuestConsole) -> None:
    await guest.tell(77, 99, 5)
    await guest.open(0)
    assert hosts.console.failure is None


_words = st.sampled_from((0, 1, 2, 4, 255, 256, 65535, 2**31, 2**32 - 1, GUEST, GUEST + SIZE - 1, 2**63, 2**64 - 1))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.sampled_from(("table", "available", "used")), st.integers(0, 80), _words),
        min_size=1,
        max_size=30,
    )
)
def test_any_words_in_the_rings(
    tmp_path_factory: pytest.TempPathFactory, pokes: list[tuple[int, str, int, int]]
) -> None:
    """The console goes on or ends with a named error; the hosts' sockets are served or closed, nothing else happens."""
    asyncio.run(poke(tmp_path_factory.mktemp("c") / "s", pokes))


async def poke(path: Path, pokes: list[tuple[int, str, int, int]]) -> None:
    unseen: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: unseen.append(str(context)))
    hosts = Hosts(path)
    async with serving_console(hosts.listener, {AGENT: hosts.agent_far, SHELL: hosts.shell_far}) as console:
        async with guest_console(path, 2) as guest:
            await guest.open(0)
            await guest.open(1)
            hosts.agent.send(b"x" * 5000)
            memory = guest.front_end.memory
            for number, part, place, word in pokes:
                queue = guest.front_end.queues[number]
                struct.pack_into("<Q", memory, getattr(queue, part) + 2 * place, word)
                queue.kick()
                await asyncio.sleep(0)
            for queue in guest.front_end.queues:
                queue.kick()
            for _ in range(20):
                await asyncio.sleep(0)
            guest.front_end.hang_up()
        drain = [asyncio.create_task(hosts.receive(sock, 1 << 30)) for sock in (hosts.agent, hosts.shell)]
        async with asyncio.timeout(LIMIT_S):
            await console.ended.wait()
        await asyncio.gather(*drain)
    hosts.close()
    assert not unseen


_happenings = st.sampled_from(
    (
        "guest opens",
        "guest closes",
        "guest writes",
        "guest reads",
        "host comes",
        "host goes",
        "host sends",
        "host reads",
    )
)


@settings(max_examples=40, deadline=None)
@example(["guest opens", "guest closes", "guest opens", "guest writes"])
@given(st.lists(_happenings, min_size=5, max_size=40))
def test_any_order_of_comings_and_goings(tmp_path_factory: pytest.TempPathFactory, happenings: list[str]) -> None:
    """After it both ends still find each other, and every buffer comes back."""
    asyncio.run(come_and_go(tmp_path_factory.mktemp("g") / "s", happenings))


async def come_and_go(path: Path, happenings: list[str]) -> None:
    hosts = Hosts(path)
    async with (
        serving_console(hosts.listener, {AGENT: hosts.agent_far, SHELL: hosts.shell_far}) as hosts.console,
        guest_console(path, 2) as guest,
    ):
        for each in happenings:
            await happen(each, hosts, guest)
        hosts.agent.close()
        hosts.agent, far = hosts.pair()
        hosts.console.connect(AGENT, far)
        await guest.open(0)
        await hosts.send(hosts.agent, b"end")
        received = b""
        while not received.endswith(b"end"):
            received += await guest.read(0)
        await guest.write(0, b"end")
        assert await hosts.receive(hosts.agent, 3) == b"end"
        queue = guest.ports[0].outgoing
        await guest.until(lambda: not (queue.take_used(), queue.chains)[1])
        assert hosts.console.failure is None
    hosts.close()


async def happen(what: str, hosts: Hosts, guest: GuestConsole) -> None:
    match what:
        case "guest opens":
            await guest.open(0)
        case "guest closes":
            await guest.close(0)
        case "guest writes" if len(guest.ports[0].outgoing.chains) < 50:
            await guest.write(0, b"w" * 150_000)
        case "guest reads":
            for buffers, _ in guest.ports[0].incoming.take_used():
                guest.ports[0].incoming.offer_chain(buffers, writable=True)
            guest.ports[0].incoming.kick()
        case "host comes":
            hosts.agent.close()
            hosts.agent, far = hosts.pair()
            hosts.console.connect(AGENT, far)
        case "host goes":
            hosts.agent.close()
            hosts.agent, far = hosts.pair()
            far.close()
        case "host sends" | "host reads":
            try:
                if what == "host sends":
                    hosts.agent.send(b"s" * 100_000)
                else:
                    hosts.agent.recv(200_000)
            except (BlockingIOError, BrokenPipeError, ConnectionResetError):
                pass
    await asyncio.sleep(0)
