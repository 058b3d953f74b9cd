"""What a client and the pool say to each other, and what a client guesses before it says anything."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from katapod.model.config import CONFIG_PATHS
from katapod.supervisor import pool_wire as wire
from katapod.supervisor.pool_client import DEFAULT_ENDPOINT, _leading_words, endpoint_of, exchange, run_in_pool
from katapod.supervisor.pool_peer import read_request

texts = st.lists(st.binary(max_size=20).map(lambda data: data.replace(b"\0", b"")), max_size=6)


@given(marks=texts, words=texts, environment=texts, umask=st.integers(0, 0o777))
def test_a_request_comes_as_it_was_sent(
    marks: list[bytes], words: list[bytes], environment: list[bytes], umask: int
) -> None:
    sent = wire.Request(b"1.2", marks, umask, words, environment)
    got = wire.Request.decode(sent.encode())
    assert (got.version, got.marks, got.umask, got.words, got.environment) == (b"1.2", marks, umask, words, environment)


@given(st.binary(max_size=60))
def test_what_is_no_request_is_refused_or_read(data: bytes) -> None:
    try:
        wire.Request.decode(data)
    except wire.FrameError:
        return


def request(words: list[bytes] | None = None) -> wire.Request:
    return wire.Request(b"1", [b"m"], 0o22, words or [b"run"], [b"A=B"])


def test_a_request_with_its_descriptors() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, Path("/dev/null").open() as null:
        data = wire.frame(wire.REQUEST, request([b"x" * 100_000]).encode())
        sent = socket.send_fds(ours, [data], [null.fileno()] * 4)
        assert sent == len(data)
        found, fds = read_request(theirs, 60.0)
        assert found.words == [b"x" * 100_000]
        assert len(fds) == 4
        for fd in fds:
            os.close(fd)


@pytest.mark.parametrize(
    ("data", "fds"),
    [
        (wire.frame(wire.REQUEST, request().encode()), 3),
        (wire.frame(wire.REQUEST, b"nothing"), 4),
        (wire.frame(wire.STATUS), 4),
        (wire.frame(wire.REQUEST, request().encode())[:-1], 4),
        ((wire.FRAME_MAX + 1).to_bytes(4, "big") + wire.REQUEST, 4),
    ],
)
def test_what_is_no_request_costs_no_descriptors(data: bytes, fds: int) -> None:
    before = os.listdir("/proc/self/fd")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        socket.send_fds(ours, [data], [0] * fds)
        ours.shutdown(socket.SHUT_WR)
        with pytest.raises(wire.FrameError):
            read_request(theirs, 60.0)
    assert os.listdir("/proc/self/fd") == before


def test_the_paths_are_those_of_the_configuration() -> None:
    assert wire.CONFIG_PATHS == CONFIG_PATHS


def test_configuration_files_and_their_fingerprint(tmp_path: Path) -> None:
    main = tmp_path / "c.toml"
    main.write_text("")
    assert wire.config_files(str(main)) == [str(main)]
    drop_ins = tmp_path / "config.d"
    drop_ins.mkdir()
    (drop_ins / "b").write_text("")
    (drop_ins / "a").write_text("")
    files = wire.config_files(str(main))
    assert files == [str(main), str(drop_ins / "a"), str(drop_ins / "b")]
    before = wire.fingerprint(files)
    assert wire.fingerprint(files) == before
    (drop_ins / "a").write_text("x")
    assert wire.fingerprint(files) != before


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("", ""),
        ("[factory]\nvm_cache_number = 0", ""),
        ("[factory]\n#vm_cache_number = 2", ""),
        ("[factory]\nvm_cache_number = 2 # two", DEFAULT_ENDPOINT),
        ('[factory]\nvm_cache_number=2\nvm_cache_endpoint = "/x/y.sock"', "/x/y.sock"),
        ("[factory]\nvm_cache_number = 1\nvm_cache_endpoint = '/x'", "/x"),
        ('[factory]\nvm_cache_number = 1\nvm_cache_endpoint = ""', DEFAULT_ENDPOINT),
        ("[factory]\nvm_cache_number = nonsense", ""),
    ],
)
def test_where_a_client_looks_for_a_server(tmp_path: Path, text: str, endpoint: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    assert endpoint_of([str(path)]) == endpoint


def test_a_drop_in_has_the_last_word(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("vm_cache_number = 3")
    (tmp_path / "b").write_text("vm_cache_number = 0")
    assert endpoint_of([str(tmp_path / "a")]) == DEFAULT_ENDPOINT
    assert endpoint_of([str(tmp_path / "a"), str(tmp_path / "b")]) == ""


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([], ("", "")),
        (["run", "--config", "x"], ("run", "")),
        (["--config", "x", "run"], ("run", "x")),
        (["--debug", "--kata-config=y", "--config", "x", "run"], ("run", "x")),
        (["--config"], ("", "")),
        (["list"], ("list", "")),
    ],
)
def test_leading_words(words: list[str], found: tuple[str, str]) -> None:
    assert _leading_words(words) == found


def test_without_a_server_a_run_is_the_callers(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    for text in ("", f'vm_cache_number = 1\nvm_cache_endpoint = "{tmp_path / "none"}"'):
        path.write_text(text)
        assert run_in_pool(["--config", str(path), "run", "busybox"]) is None
    assert run_in_pool(["--config", str(tmp_path / "missing"), "run", "busybox"]) is None
    assert exchange(str(tmp_path / "none"), wire.STATUS, 1.0) is None


def test_a_client_loads_next_to_nothing() -> None:
    heavy = (
        "asyncio",
        "click",
        "dataclasses",
        "enum",
        "json",
        "logging",
        "msgspec",
        "pathlib",
        "re",
        "socket",
        "typing",
    )
    code = f"import sys, katapod.cli.entry; print(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-S", "-c", code], env=SOURCES, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


SOURCES = {"PYTHONPATH": str(Path(wire.__file__).parents[2])}
