"""Bounded logs: never larger than promised, never written through a descriptor that is someone else's."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from katapod.host.logs import BoundedLog, read_tail


def kept(path: Path) -> bytes:
    older = Path(f"{path}.1")
    return (older.read_bytes() if older.exists() else b"") + path.read_bytes()


@given(sizes=st.lists(st.integers(0, 20_000), max_size=30), limit=st.sampled_from([0, 8192, 10_000]))
def test_the_newest_bytes_are_kept_within_the_limit(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int
) -> None:
    path = tmp_path_factory.mktemp("log") / "log"
    log = BoundedLog(path, limit)
    written = b""
    for number, size in enumerate(sizes):
        data = bytes([number % 256]) * size
        log.write(data)
        written += data
        assert sum(item.stat().st_size for item in path.parent.iterdir()) <= max(8192, limit)
    log.close()
    data = kept(path)
    assert written.endswith(data)
    assert len(data) >= min(len(written), max(8192, limit) // 2 - 20_000, 1)


def test_at_least_half_of_the_limit_is_kept(tmp_path: Path) -> None:
    log = BoundedLog(tmp_path / "log", 20_000)
    for _ in range(1000):
        log.write(b"x" * 99 + b"\n")
        assert len(kept(tmp_path / "log")) >= min(10_000 - 100, 100)
    log.close()
    assert 10_000 <= len(kept(tmp_path / "log")) <= 20_000


def test_goes_on_where_an_earlier_log_ended(tmp_path: Path) -> None:
    for text in (b"one\n", b"two\n"):
        log = BoundedLog(tmp_path / "log", 8192)
        log.write(text)
        log.close()
    assert (tmp_path / "log").read_bytes() == b"one\ntwo\n"


def test_close_twice(tmp_path: Path) -> None:
    log = BoundedLog(tmp_path / "log", 8192)
    log.close()
    log.close()


def test_is_private(tmp_path: Path) -> None:
    BoundedLog(tmp_path / "log", 8192).close()
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


def test_no_space_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "log").symlink_to("/dev/full")
    log = BoundedLog(tmp_path / "log", 8192)
    with pytest.raises(OSError, match="No space left"):
        log.write(b"x")
    log.close()


def test_a_rotation_that_fails_harms_no_other_file(tmp_path: Path) -> None:
    """The log's directory vanishes (delete --force): the descriptor must not be used after it was closed."""
    directory = tmp_path / "d"
    directory.mkdir()
    log = BoundedLog(directory / "log", 8192)
    log.write(b"x" * 4096)
    (directory / "log").unlink()
    directory.rmdir()
    others = [os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)]
    for _ in range(3):
        with pytest.raises(FileNotFoundError):
            log.write(b"secret")
        others.append(os.open(tmp_path / "other", os.O_RDWR))
    assert (tmp_path / "other").read_bytes() == b""
    directory.mkdir()
    log.write(b"again")
    assert (directory / "log").read_bytes() == b"again"
    log.close()
    for fd in others:
        os.close(fd)


def test_tail_is_fit_for_a_terminal(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"\x1b[31mred\x1b[0m\r\n\x00\x07bell\n\xff\xfe\n\n   \na\tb\xc2\x9b31m\xe2\x80\xae.\nend")
    assert read_tail(path) == "red\nbell\n\ufffd\ufffd\na\tb31m.\nend"


def test_tail_spans_both_halves(tmp_path: Path) -> None:
    (tmp_path / "log.1").write_text("one\ntwo\n")
    (tmp_path / "log").write_text("three\n")
    assert read_tail(tmp_path / "log") == "one\ntwo\nthree"
    assert read_tail(tmp_path / "log", max_lines=2) == "two\nthree"
    assert read_tail(tmp_path / "log", max_bytes=8) == "o\nthree"


def test_tail_of_nothing(tmp_path: Path) -> None:
    assert read_tail(tmp_path / "none") == ""


@given(st.binary(max_size=500))
def test_tail_of_anything_has_no_control_characters(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("log") / "log"
    path.write_bytes(data)
    assert all(char.isprintable() or char in "\t\n" for char in read_tail(path))


def test_a_log_that_was_moved_goes_on_where_it_is(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    after.mkdir()
    log = BoundedLog(before / "log", 8192)
    log.write(b"a" * 4000)
    os.rename(before / "log", after / "log")
    before.rmdir()
    log.write(b"b" * 4000)
    log.write(b"c" * 4000)
    log.close()
    assert kept(after / "log") == b"b" * 4000 + b"c" * 4000
