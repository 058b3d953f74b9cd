"""The pool's server: forks, hands over, refills, ends. Its members here are processes without a machine."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
import pytest

from katapod.model.errors import AlreadyExists, KatapodError
from katapod.supervisor import pool_wire as wire
from katapod.supervisor.pool_client import exchange
from katapod.supervisor.pool_server import ServerStatus, listening

SERVER = """
import os, socket, sys, time
from pathlib import Path
import msgspec
from katapod.supervisor import pool_wire as wire
from katapod.supervisor.pool_member import MemberReport
from katapod.supervisor.pool_server import PoolServer, listening

folder, number = Path(sys.argv[1]), int(sys.argv[2])

def member(control):
    if (folder / "fail").exists():
        return 1
    control.send(msgspec.json.encode(MemberReport("m", os.getpid(), 1, 256)))
    _, fds, _, _ = socket.recv_fds(control, 16, 1)
    if not fds:
        return 0
    client = socket.socket(fileno=fds[0])
    client.setblocking(True)
    client.recv(wire.HEADER)
    control.send(b"taken")
    control.close()
    client.sendall(wire.frame(wire.EXIT, b"%d" % os.getpid()))
    client.recv(1)  # until it goes
    return 0

def clean_up():
    (folder / "cleaned").touch()

with listening(folder / "sock") as listener:
    PoolServer(listener, number, member, clean_up).serve()
"""


def wait_for(seen: Callable[[], object], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not seen():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def status(folder: Path) -> ServerStatus | None:
    answer = exchange(str(folder / "sock"), wire.STATUS, 60.0)
    return None if answer is None else msgspec.json.decode(answer, type=ServerStatus)


def ready(folder: Path) -> set[int]:
    found = status(folder)
    return {vm.pid for vm in found.vms} if found else set()


@contextmanager
def serving(folder: Path, number: int) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-c", SERVER, str(folder), str(number)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            yield server
        finally:
            server.terminate()


def is_alive(pid: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def take(folder: Path) -> tuple[socket.socket, int]:
    """A client that stays, and the member that has it; 0 if none was ready."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(60)
    client.connect(str(folder / "sock"))
    client.sendall(wire.frame(wire.REQUEST))
    length, kind = wire.parse_header(client.recv(wire.HEADER, socket.MSG_WAITALL))
    return client, int(client.recv(length)) if kind == wire.EXIT else 0


def test_keeps_so_many_and_refills(tmp_path: Path) -> None:
    with serving(tmp_path, 2) as server:
        wait_for(lambda: len(ready(tmp_path)) == 2)
        first = ready(tmp_path)
        client, member = take(tmp_path)
        assert member in first
        wait_for(lambda: len(ready(tmp_path)) == 2)
        assert member not in ready(tmp_path)
        found = status(tmp_path)
        assert found is not None
        assert found.pid == server.pid
        client.close()
    assert server.stdout is not None


def test_who_finds_none_ready_is_refused(tmp_path: Path) -> None:
    with serving(tmp_path, 1):
        wait_for(lambda: ready(tmp_path))
        (tmp_path / "fail").touch()  # from now on none gets ready
        taken, member = take(tmp_path)
        assert member
        refused, nobody = take(tmp_path)
        assert nobody == 0
        taken.close()
        refused.close()


def test_says_once_that_it_is_full(tmp_path: Path) -> None:
    with serving(tmp_path, 1) as server:
        wait_for(lambda: ready(tmp_path))
        client, _ = take(tmp_path)
        client.close()
        wait_for(lambda: ready(tmp_path))
        server.terminate()
        assert server.communicate(timeout=60) == ("vm factory initialized\n", "")
        assert server.returncode == 0


def test_cleans_up_after_a_killed_member_and_replaces_it(tmp_path: Path) -> None:
    with serving(tmp_path, 1):
        wait_for(lambda: ready(tmp_path))
        (killed,) = ready(tmp_path)
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: (tmp_path / "cleaned").exists())
        wait_for(lambda: ready(tmp_path) - {killed})


def test_waits_longer_and_longer_for_members_that_fail(tmp_path: Path) -> None:
    (tmp_path / "fail").touch()
    with serving(tmp_path, 1) as server:
        assert server.stderr is not None
        assert server.stderr.readline() == "a machine of the pool failed; the next one is started in 1 s\n"
        assert server.stderr.readline() == "a machine of the pool failed; the next one is started in 2 s\n"
        assert ready(tmp_path) == set()


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "quit"])
def test_ends_with_its_idle_members_and_leaves_the_taken(tmp_path: Path, how: str) -> None:
    with serving(tmp_path, 1) as server:
        wait_for(lambda: ready(tmp_path))
        client, member = take(tmp_path)
        wait_for(lambda: ready(tmp_path))
        (idle,) = ready(tmp_path)
        if how == "quit":
            assert exchange(str(tmp_path / "sock"), wire.QUIT, 60.0) is not None
        else:
            server.send_signal(signal.Signals[how])
        assert server.wait(60) == 0
        assert not (tmp_path / "sock").exists()
        assert not is_alive(idle)
        with listening(tmp_path / "sock"):  # who was taken does not hold the lock of the server
            assert is_alive(member)
        client.close()
        wait_for(lambda: not is_alive(member))


def test_a_killed_server_takes_its_idle_members_along(tmp_path: Path) -> None:
    with serving(tmp_path, 2) as server:
        wait_for(lambda: len(ready(tmp_path)) == 2)
        members = ready(tmp_path)
        server.kill()
        wait_for(lambda: not any(is_alive(member) for member in members))
        with listening(tmp_path / "sock") as listener:  # the stale socket is replaced
            assert listener.getsockname() == str(tmp_path / "sock")


def test_strange_clients_do_no_harm(tmp_path: Path) -> None:
    with serving(tmp_path, 1):
        wait_for(lambda: ready(tmp_path))
        silent = socket.socket(socket.AF_UNIX)
        silent.connect(str(tmp_path / "sock"))
        for data in (b"", b"ab", b"\xff" * 5, b"\0\0\0\0?", b"GET / HTTP/1.1\r\n\r\n"):
            with socket.socket(socket.AF_UNIX) as strange:
                strange.connect(str(tmp_path / "sock"))
                strange.sendall(data)
        client, member = take(tmp_path)
        assert member
        client.close()
        silent.close()


def test_the_socket_is_roots_only(tmp_path: Path) -> None:
    with listening(tmp_path / "deep" / "sock"):
        assert (tmp_path / "deep" / "sock").stat().st_mode & 0o777 == 0o600


def test_one_server_on_a_socket(tmp_path: Path) -> None:
    with serving(tmp_path, 1) as server:
        wait_for(lambda: ready(tmp_path))
        with (
            pytest.raises(AlreadyExists, match=f"another server does, process {server.pid}"),
            listening(tmp_path / "sock"),
        ):
            pass
        assert ready(tmp_path)


def test_places_where_no_socket_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path, cause in (
        (tmp_path / "file", "not a socket"),
        (tmp_path / "file" / "sock", "File exists"),
        (tmp_path / ("x" * 120), "too long"),
    ):
        with pytest.raises(KatapodError, match=cause), listening(path):
            pass
    assert (tmp_path / "file").read_text() == "mine"
