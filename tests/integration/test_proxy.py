"""The program that stands on the host for a process in a guest: what it does with what it hears."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from katapod.oci.errors import OciError
from katapod.oci.proxy import PROGRAM, Proxy, start_proxy
from kit.oci import reap

NOWHERE = {"netns": "", "mounts": "", "pids": "", "cgroups": ()}


@pytest.fixture
def proxy() -> Iterator[tuple[Proxy, socket.socket]]:
    made = start_proxy(("test",), NOWHERE, None)
    with socket.socket(fileno=made.end) as end:
        end.settimeout(180)
        yield made, end


@pytest.mark.parametrize(("order", "status"), [(b"x\0", 0), (b"x\7", 7), (b"x\xff", 255), (b"s\x0f", 143), (b"", 137)])
def test_how_it_ends(proxy: tuple[Proxy, socket.socket], order: bytes, status: int) -> None:
    made, end = proxy
    if order:
        end.sendall(order)
    else:
        end.shutdown(socket.SHUT_RDWR)
    assert reap(made.pid) == status


def test_signals_are_passed_on(proxy: tuple[Proxy, socket.socket]) -> None:
    made, end = proxy
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGWINCH, signal.SIGRTMIN + 1):
        os.kill(made.pid, number)
        assert end.recv(1) == bytes([number])
    os.kill(made.pid, signal.SIGKILL)
    assert end.recv(1) == b""
    assert reap(made.pid) == 137


def test_it_is_a_group_and_the_first_process_of_its_own(proxy: tuple[Proxy, socket.socket]) -> None:
    made, end = proxy
    assert os.getpgid(made.pid) == os.getsid(made.pid) == made.pid
    status = Path(f"/proc/{made.pid}/status").read_text()
    assert next(line.split()[-1] for line in status.splitlines() if line.startswith("NSpid:")) == "1"
    beside = start_proxy(("exec",), {**NOWHERE, "pids": f"/proc/{made.pid}/ns/pid"}, None)
    with socket.socket(fileno=beside.end) as other:
        other.sendall(b"s\x0f")
        assert os.waitstatus_to_exitcode(os.waitpid(beside.pid, 0)[1]) == -signal.SIGTERM
    end.sendall(b"x\0")
    assert reap(made.pid) == 0


def test_a_namespace_that_is_none_is_an_error() -> None:
    with pytest.raises(OciError, match="/no/such"):
        start_proxy(("test",), {**NOWHERE, "netns": "/no/such"}, None)
    with pytest.raises(OciError, match="it ended at once"):
        start_proxy(("test",), {**NOWHERE, "netns": "/dev/null"}, None)


def test_it_was_made_from_its_source() -> None:
    tool = Path(PROGRAM).parents[3] / "tools/build_native.py"
    subprocess.run([sys.executable, tool, "--check"], check=True)


def test_the_mounts_of_others_stay_as_they_are(proxy: tuple[Proxy, socket.socket]) -> None:
    assert Path(f"/proc/{os.getpid()}").exists()  # its own /proc is for a mount namespace of its own
