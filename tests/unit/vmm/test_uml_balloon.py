"""The balloon of User-mode Linux, before a front end with real rings: what is reported becomes a hole in the memory."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from katapod.vmm.uml.balloon_device import REPORTED, REPORTING, Balloon, serving_balloon
from kit.vhost_driver import GUEST, INDIRECT, OFFSET, SIZE, WRITE, DriverQueue, FrontEnd

PAGE = 4096
FEATURES = 1 << 32 | REPORTING
LIMIT_S = 60.0


@pytest.fixture
async def balloon(tmp_path: Path) -> AsyncIterator[Balloon]:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(tmp_path / "balloon.sock"))
    listener.listen(1)
    async with serving_balloon(listener) as balloon:
        yield balloon


@pytest.fixture
async def front_end(balloon: Balloon, tmp_path: Path) -> AsyncIterator[FrontEnd]:
    """All queues are enabled."""
    front_end = await FrontEnd.connect(tmp_path / "balloon.sock")
    await front_end.negotiate(FEATURES)
    front_end.send_memory()
    for _ in range(3):
        queue = front_end.add_queue()
        queue.send_kick()
        front_end.enable(queue)
    yield front_end
    front_end.close()


@pytest.fixture
def reported(front_end: FrontEnd) -> DriverQueue:
    return front_end.queues[REPORTED]


def fill(front_end: FrontEnd, pages: int) -> int:
    """Offset of memory that is written."""
    start = front_end.allocate(pages * PAGE)
    front_end.memory[start : start + pages * PAGE] = b"x" * (pages * PAGE)
    return start


def present(front_end: FrontEnd, offset: int) -> bool:
    """Whether the file has this page. lseek(2): what is found from a hole on lies behind it."""
    try:
        return os.lseek(front_end.file, OFFSET + offset, os.SEEK_DATA) == OFFSET + offset
    except OSError:
        return False


async def ended(balloon: Balloon) -> str:
    async with asyncio.timeout(LIMIT_S):
        await balloon._ended.wait()
    return str(balloon.failure)


async def test_what_is_reported_is_freed_and_nothing_else(front_end: FrontEnd, reported: DriverQueue) -> None:
    start = fill(front_end, 64)
    freed = [start + n * PAGE for n in range(64) if n % 3 == 0]
    for piece in (freed[:16], freed[16:]):
        reported.offer_chain([(at, PAGE) for at in piece], writable=True)
    reported.kick()
    back = await reported.wait_used()
    while len(back) < 2:
        back += await reported.wait_used()
    assert [[at for at, _ in chain] for chain, _ in back] == [freed[:16], freed[16:]]
    assert [at for at in range(start, start + 64 * PAGE, PAGE) if not present(front_end, at)] == freed
    assert bytes(front_end.memory[start : start + PAGE]) == bytes(PAGE)
    assert bytes(front_end.memory[start + PAGE : start + 2 * PAGE]) == b"x" * PAGE
    assert os.fstat(front_end.file).st_size == OFFSET + SIZE


async def test_a_block_is_as_large_as_the_guest_has_it(front_end: FrontEnd, reported: DriverQueue) -> None:
    start = fill(front_end, 1024)
    reported.offer_chain([(start, 1023 * PAGE)], writable=True)
    reported.kick()
    await reported.wait_used()
    assert not any(present(front_end, at) for at in range(start, start + 1023 * PAGE, PAGE))
    assert present(front_end, start + 1023 * PAGE)


async def test_more_than_one_turn_of_them(front_end: FrontEnd, balloon: Balloon, reported: DriverQueue) -> None:
    start = fill(front_end, 200)
    for n in range(200):
        reported.offer_chain([(start + n * PAGE, PAGE)], writable=True)
    reported.kick()
    back = await reported.wait_used()
    while len(back) < 200:
        back += await reported.wait_used()
    assert balloon.freed_bytes == 200 * PAGE


async def test_what_the_driver_reads_is_left_alone(front_end: FrontEnd, reported: DriverQueue) -> None:
    start = fill(front_end, 1)
    reported.offer_chain([(start, PAGE)], writable=False)
    reported.kick()
    await reported.wait_used()
    assert present(front_end, start)


@pytest.mark.parametrize("index", [0, 1])
async def test_nothing_is_inflated(front_end: FrontEnd, index: int) -> None:
    start = fill(front_end, 1)
    queue = front_end.queues[index]
    queue.offer_chain([(start, PAGE)], writable=True)
    queue.kick()
    await queue.wait_used()
    assert present(front_end, start)


@pytest.mark.parametrize(
    ("address", "length"),
    [(GUEST - PAGE, PAGE), (GUEST + SIZE, PAGE), (GUEST + SIZE - PAGE, 2 * PAGE), (GUEST, 0xFFFFFFFF), (2**64 - 1, 2)],
)
async def test_what_is_not_its_memory_ends_it(
    front_end: FrontEnd, balloon: Balloon, reported: DriverQueue, address: int, length: int
) -> None:
    start = fill(front_end, 1)
    reported.set_descriptor(0, address, length, WRITE)
    reported.set_available(0)
    reported.kick()
    assert "are not in the guest's memory" in await ended(balloon)
    assert await front_end.hung_up_on()
    assert present(front_end, start)


async def test_a_table_of_descriptors_elsewhere_ends_it(
    front_end: FrontEnd, balloon: Balloon, reported: DriverQueue
) -> None:
    reported.set_descriptor(0, GUEST, PAGE, INDIRECT)
    reported.set_available(0)
    reported.kick()
    assert "cannot use a chain" in await ended(balloon)


async def test_what_the_driver_writes_to_its_configuration_is_nobody_s(front_end: FrontEnd) -> None:
    front_end.send(25, b"\4\0\0\0" + b"\4\0\0\0" + bytes(4) + b"\1\0\0\0")
    assert (await front_end.ask(24, b"\0\0\0\0" + b"\x10\0\0\0" + bytes(4 + 16)))[12:] == bytes(16)
