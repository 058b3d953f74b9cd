"""Guest memory between memfds and files: nothing lost, holes kept, zeros left out."""

import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from katapod.host.guest_memory import PAGE_BYTES, copy_memory, new_memory, save_memory
from katapod.model.errors import KatapodError

SIZE_MIB = 4
PAGES = (SIZE_MIB << 20) // PAGE_BYTES


@pytest.fixture
def source() -> Iterator[int]:
    fd = new_memory(SIZE_MIB)
    yield fd
    os.close(fd)


@pytest.fixture
def target() -> Iterator[int]:
    fd = new_memory(SIZE_MIB)
    yield fd
    os.close(fd)


@pytest.fixture
def saved(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "memory", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def content(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def allocated(fd: int) -> int:
    """Bytes that are no hole."""
    return os.fstat(fd).st_blocks * 512


def test_new_memory_is_one_hole(source: int) -> None:
    assert os.fstat(source).st_size == SIZE_MIB << 20
    assert allocated(source) == 0
    assert not os.get_inheritable(source)


def test_memory_can_be_as_large_as_a_guest() -> None:
    fd = new_memory(64 << 10)
    try:
        assert os.fstat(fd).st_size == 64 << 30
    finally:
        os.close(fd)


def test_nothing_to_copy_or_to_save(source: int, target: int, saved: int) -> None:
    assert copy_memory(source, target) == 0
    assert save_memory(source, saved, SIZE_MIB) == 0
    assert allocated(target) == allocated(saved) == 0
    assert os.fstat(saved).st_size == SIZE_MIB << 20


def test_pages_of_zeros_are_left_out(source: int, target: int, saved: int) -> None:
    """What a guest has freed and zeroed costs nothing in the template, nor in its clones."""
    os.pwrite(source, bytes(SIZE_MIB << 20), 0)
    os.pwrite(source, b"x", 100 * PAGE_BYTES + 17)
    assert allocated(source) == SIZE_MIB << 20
    assert save_memory(source, saved, SIZE_MIB) == PAGE_BYTES
    assert allocated(saved) < 16 * PAGE_BYTES
    assert copy_memory(saved, target) < 16 * PAGE_BYTES
    assert content(target) == content(source)


def test_last_byte_of_the_last_page(source: int, target: int, saved: int) -> None:
    os.pwrite(source, b"\xff", (SIZE_MIB << 20) - 1)
    assert save_memory(source, saved, SIZE_MIB) == PAGE_BYTES
    copy_memory(saved, target)
    assert content(target) == content(source)


page_runs = st.lists(st.tuples(st.integers(0, PAGES - 1), st.integers(1, 300), st.booleans()), max_size=12)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(page_runs)
def test_round_trip(tmp_path: Path, runs: list[tuple[int, int, bool]]) -> None:
    """Any pattern of holes, zeros and data comes back, and takes no more room than its data."""
    source, target = new_memory(SIZE_MIB), new_memory(SIZE_MIB)
    saved = os.open(tmp_path / "memory", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        for number, (first, count, zero) in enumerate(runs, start=1):
            count = min(count, PAGES - first)
            os.pwrite(source, bytes([0 if zero else number]) * (count * PAGE_BYTES), first * PAGE_BYTES)
        whole = content(source)
        data = sum(any(whole[at : at + PAGE_BYTES]) for at in range(0, len(whole), PAGE_BYTES)) * PAGE_BYTES
        assert save_memory(source, saved, SIZE_MIB) == data
        assert content(saved) == whole
        assert data <= copy_memory(saved, target) <= allocated(saved) + PAGE_BYTES * PAGES
        assert content(target) == whole
    finally:
        for fd in (source, target, saved):
            os.close(fd)


def test_the_template_is_not_changed_by_its_clones(source: int, target: int) -> None:
    os.pwrite(source, b"template", 0)
    copy_memory(source, target)
    with mmap.mmap(target, SIZE_MIB << 20) as memory:
        memory[:8] = b"clone---"
    assert content(source)[:8] == b"template"
    assert content(target)[:8] == b"clone---"


def test_memory_that_cannot_be_written(source: int, target: int) -> None:
    os.pwrite(source, b"x", 0)
    sealed = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(sealed, SIZE_MIB << 20)
        fcntl.fcntl(sealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        with pytest.raises(KatapodError, match="cannot copy the template's memory: Operation not permitted"):
            copy_memory(source, sealed)
        with pytest.raises(KatapodError, match="cannot save the template's memory: Operation not permitted"):
            save_memory(source, sealed, SIZE_MIB)
    finally:
        os.close(sealed)
