"""vhost-user as our devices speak it: what a front end may say, and what it may not, up to any bytes at all."""

import asyncio
import fcntl
import os
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from katapod.vmm.uml.console_device import Console, serving_console
from katapod.vmm.uml.vhost_user import Frame as ReceivedFrame
from katapod.vmm.uml.vhost_user import Region, parse_memory_table, render_memory_table
from kit.vhost_driver import GUEST, MESSAGE, REGION, SIZE, USER, FrontEnd, guest_console

LIMIT_S = 60.0
FEATURES = 1 << 32 | 1 << 1


@pytest.fixture
async def console(tmp_path: Path) -> AsyncIterator[Console]:
    near, far = socket.socketpair()
    with near, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(1)
        async with serving_console(listener, {"one": far}) as console:
            yield console


@pytest.fixture
async def front_end(console: Console, tmp_path: Path) -> AsyncIterator[FrontEnd]:
    front_end = await FrontEnd.connect(tmp_path / "s")
    yield front_end
    front_end.close()


async def refused(console: Console, front_end: FrontEnd, why: str) -> None:
    """The device has ended for that reason, and the front end is hung up on."""
    assert await front_end.hung_up_on()
    async with asyncio.timeout(LIMIT_S):
        await console.ended.wait()
    assert why in str(console.failure)


async def test_only_the_first_is_served(console: Console, front_end: FrontEnd, tmp_path: Path) -> None:
    await front_end.ask(1)
    with pytest.raises(ConnectionRefusedError):
        await FrontEnd.connect(tmp_path / "s")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (MESSAGE.pack(1, 1, 513), "513 bytes"),
        (MESSAGE.pack(1, 1, 2**32 - 1), "4294967295 bytes"),
        (MESSAGE.pack(1, 0, 0), "flags 0x0"),
        (MESSAGE.pack(1, 2, 0), "flags 0x2"),
        (MESSAGE.pack(99, 1, 0), "request 99 is unknown"),
        (MESSAGE.pack(4, 1, 0), "request 4 is unknown"),
        (MESSAGE.pack(2, 1, 4) + bytes(4), "4 bytes in place of 8"),
        (MESSAGE.pack(2, 1, 8) + struct.pack("<Q", 1 << 32), "the driver takes"),
        (MESSAGE.pack(2, 1, 8) + struct.pack("<Q", FEATURES | 1 << 28), "the driver takes"),
        (MESSAGE.pack(16, 1, 8) + struct.pack("<Q", 1), "what was not offered"),
        (MESSAGE.pack(24, 1, 12) + struct.pack("<III", 0, 4, 0), "4 bytes at 0"),
        (MESSAGE.pack(24, 1, 12) + struct.pack("<III", 2**31, 0, 0), "at 2147483648"),
        (MESSAGE.pack(24, 1, 4) + bytes(4), "asked in 4"),
        (MESSAGE.pack(8, 1, 8) + struct.pack("<II", 4, 256), "ring 4: the device has 4"),
        (MESSAGE.pack(13, 1, 8) + struct.pack("<Q", 0), "descriptor: 0x0 with 0"),
        (MESSAGE.pack(13, 1, 8) + struct.pack("<Q", 1 << 40), "0x10000000000"),
        (MESSAGE.pack(12, 1, 8) + struct.pack("<Q", 1 << 8), "no eventfd"),
        (MESSAGE.pack(21, 1, 0), "none was sent"),
        (MESSAGE.pack(5, 1, 8) + struct.pack("<II", 1, 0), "1 regions in 8 bytes"),
        (MESSAGE.pack(5, 1, 40) + struct.pack("<II", 1, 0) + REGION.pack(0, 4096, 0, 0), "1 regions, 0 descriptors"),
        (MESSAGE.pack(5, 1, 8) + struct.pack("<II", 9, 0), "9 regions"),
        (MESSAGE.pack(18, 1, 8) + struct.pack("<II", 9, 1), "ring 9"),
        (MESSAGE.pack(9, 1, 40) + struct.pack("<IIQQQQ", 0, 1, 0, 0, 0, 0), "flags are 0x1"),
    ],
)
async def test_a_wrong_message(console: Console, front_end: FrontEnd, data: bytes, why: str) -> None:
    front_end.send_raw(data)
    await refused(console, front_end, why)


async def test_an_end_within_a_message(console: Console, front_end: FrontEnd) -> None:
    front_end.send_raw(MESSAGE.pack(2, 1, 8) + bytes(3))
    front_end.sock.shutdown(socket.SHUT_WR)
    await refused(console, front_end, "within a message")


async def test_a_message_in_pieces(console: Console, front_end: FrontEnd) -> None:
    for byte in MESSAGE.pack(1, 1, 0):
        front_end.send_raw(bytes([byte]))
        await asyncio.sleep(0)
    assert (await front_end.ask(1))[4] & 1  # this is the first answer, and the second is on its way


async def test_more_descriptors_than_any_message_has(console: Console, front_end: FrontEnd) -> None:
    before = len(os.listdir("/proc/self/fd"))
    front_end.send_raw(MESSAGE.pack(3, 1, 0), [front_end.file] * 20)
    await refused(console, front_end, "more than 8 descriptors")
    assert len(os.listdir("/proc/self/fd")) <= before


async def test_descriptors_that_no_message_asked_for_are_closed(console: Console, front_end: FrontEnd) -> None:
    await front_end.ask(1)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        front_end.send(3, descriptors=[front_end.file] * 8)
    await front_end.ask(1)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("region", "why"),
    [
        ((GUEST, 0, USER, 0), "ends beyond all memory"),
        ((GUEST, SIZE, USER, 1 << 62), "no file of"),
        ((GUEST, SIZE * 2, USER, 0), "no file of"),
        ((2**64 - 1, SIZE, USER, 0), "ends beyond all memory"),
        ((GUEST, 2**64 - 1, USER, 0), "ends beyond all memory"),
    ],
)
async def test_wrong_memory(console: Console, front_end: FrontEnd, region: tuple[int, int, int, int], why: str) -> None:
    front_end.send(5, struct.pack("<II", 1, 0) + REGION.pack(*region), [front_end.file])
    await refused(console, front_end, why)


@pytest.mark.parametrize("mode", [os.O_RDONLY, os.O_WRONLY, os.O_PATH])
async def test_memory_that_the_guest_may_not_write(
    console: Console, front_end: FrontEnd, tmp_path: Path, mode: int
) -> None:
    """A kernel in a jail can read its own program and libraries. We could write them for it."""
    file = tmp_path / "library"
    file.write_bytes(bytes(SIZE))
    fd = os.open(file, mode)
    try:
        front_end.send(5, struct.pack("<II", 1, 0) + REGION.pack(GUEST, SIZE, USER, 0), [fd])
        await refused(console, front_end, "not for reading and writing")
    finally:
        os.close(fd)


async def test_a_flood_of_messages_leaves_others_their_turn(console: Console, front_end: FrontEnd) -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    front_end.send_raw(MESSAGE.pack(3, 1, 0) * 5000)
    counting = asyncio.create_task(count())
    await front_end.ask(1)
    counting.cancel()
    assert turns > 2500


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null"])
async def test_memory_that_is_no_file(console: Console, front_end: FrontEnd, path: str) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        front_end.send(5, struct.pack("<II", 1, 0) + REGION.pack(GUEST, SIZE, USER, 0), [fd])
        await refused(console, front_end, "no file of")
    finally:
        os.close(fd)


async def test_memory_whose_flags_the_guest_has_changed(console: Console, tmp_path: Path) -> None:
    """With O_APPEND on a descriptor that we shared, all that we write would go to the end of the file."""
    async with guest_console(tmp_path / "s", 1) as guest:
        flags = fcntl.fcntl(guest.front_end.file, fcntl.F_GETFL)
        fcntl.fcntl(guest.front_end.file, fcntl.F_SETFL, flags | os.O_APPEND)
        size = os.fstat(guest.front_end.file).st_size
        await guest.open(0)
        assert os.fstat(guest.front_end.file).st_size == size


@pytest.mark.parametrize("request_number", [12, 13])
async def test_descriptors_of_the_wrong_kind(console: Console, front_end: FrontEnd, request_number: int) -> None:
    """A pipe that fills up, or that somebody else reads first, would block us."""
    read_end, write_end = os.pipe()
    try:
        front_end.send(request_number, struct.pack("<Q", 0), [write_end])
        assert await front_end.hung_up_on()
    finally:
        os.close(read_end)
        os.close(write_end)


@pytest.mark.parametrize(
    ("size", "why"),
    [(0, "size 0"), (3, "size 3"), (2048, "size 2048"), (2**32 - 1, "size 4294967295"), (1 << 10, "")],
)
async def test_sizes_of_a_ring(console: Console, front_end: FrontEnd, size: int, why: str) -> None:
    front_end.send_memory()
    queue = front_end.add_queue(1024)
    front_end.send(8, struct.pack("<II", 0, size))
    queue.send_kick()
    front_end.enable(queue)
    if why:
        await refused(console, front_end, why)
    else:
        await front_end.ask(1)
        assert console.failure is None


@pytest.mark.parametrize("shift", [1, 2, 8, SIZE, -USER])
async def test_addresses_of_a_ring(console: Console, front_end: FrontEnd, shift: int) -> None:
    """Out of the memory, or not aligned."""
    front_end.send_memory()
    queue = front_end.add_queue()
    at = USER + queue.table + shift
    front_end.send(9, struct.pack("<IIQQQQ", 0, 0, at, USER + queue.used, USER + queue.available, 0))
    queue.send_kick()
    front_end.enable(queue)
    await refused(console, front_end, "cannot use a ring")


async def test_an_active_ring_is_left_alone(console: Console, front_end: FrontEnd) -> None:
    front_end.send_memory()
    queue = front_end.add_queue()
    queue.send_kick()
    front_end.enable(queue)
    front_end.send(8, struct.pack("<II", 0, 128))
    await refused(console, front_end, "it is active")


async def test_memory_is_not_exchanged_under_an_active_ring(console: Console, front_end: FrontEnd) -> None:
    front_end.send_memory()
    queue = front_end.add_queue()
    queue.send_kick()
    front_end.enable(queue)
    front_end.send_memory()
    await refused(console, front_end, "rings are active")


async def test_a_ring_without_memory(console: Console, front_end: FrontEnd) -> None:
    queue = front_end.add_queue()
    queue.send_kick()
    front_end.enable(queue)
    await refused(console, front_end, "its memory or its addresses are missing")


def test_a_memory_table_is_cut_to_its_regions() -> None:
    one = Region(GUEST, SIZE, USER, 4096)
    payload = render_memory_table((one,))
    frame = ReceivedFrame(5, 1, payload + bytes(32), [os.open("/dev/null", os.O_RDONLY)])
    with frame:
        assert parse_memory_table(frame) == (one,)
    assert len(payload) == 8 + 32


_numbers = st.sampled_from((0, 1, 2, 3, 4, 255, 256, 4096, SIZE, USER, GUEST, 2**31, 2**32 - 1, 2**63, 2**64 - 1))
_payloads = st.one_of(
    st.binary(max_size=60),
    st.lists(_numbers, max_size=8).map(lambda words: struct.pack(f"<{len(words)}Q", *words)),
    st.tuples(st.integers(0, 5), st.integers(0, 2**32 - 1)).map(lambda pair: struct.pack("<II", *pair)),
)
_messages = st.tuples(
    st.integers(0, 26), _payloads, st.lists(st.sampled_from(("memory", "event", "socket")), max_size=3)
)


@settings(max_examples=100, deadline=None)
@given(st.lists(_messages, max_size=12))
def test_any_messages(tmp_path_factory: pytest.TempPathFactory, messages: list[tuple[int, bytes, list[str]]]) -> None:
    asyncio.run(say(tmp_path_factory.mktemp("v") / "s", messages))


async def say(path: Path, messages: list[tuple[int, bytes, list[str]]]) -> None:
    """All of it is understood, or the device ends with a named error; nothing is left open."""
    unseen: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: unseen.append(str(context)))
    before = len(os.listdir("/proc/self/fd"))
    near, far = socket.socketpair()
    with near, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(1)
        async with serving_console(listener, {"one": far}) as console:
            front_end = await FrontEnd.connect(path)
            event, (one, other) = os.eventfd(0), socket.socketpair()
            kinds = {"memory": front_end.file, "event": event, "socket": one.fileno()}
            try:
                for request, payload, descriptors in messages:
                    front_end.send(request, payload, [kinds[each] for each in descriptors])
                    await asyncio.sleep(0)
            except (BrokenPipeError, ConnectionResetError):
                pass
            front_end.sock.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(LIMIT_S):
                await console.ended.wait()
            one.close()
            other.close()
            os.close(event)
            front_end.close()
            del front_end
    assert not unseen
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # the guest's own mapping goes with its garbage
