"""Standard streams in bulk: nothing is lost, nobody buffers without bound, ends are passed on."""

import hashlib
import os
import re
import subprocess
import threading
import time
from pathlib import Path

import pytest

from kit.kata import Kata, wait_for
from kit.large import LARGE
from kit.templates import kata_command

BULK_BYTES = 80 << 20
EMULATED_BYTES = BULK_BYTES if LARGE else 16 << 20
PIECE = 1 << 20
PIPE = 1 << 16  # bytes that a pipe holds


@pytest.fixture(scope="module")
def bulk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 MiB that cannot be guessed."""
    path = tmp_path_factory.mktemp("bulk") / "random"
    with path.open("wb") as handle:
        for _ in range(BULK_BYTES // PIECE):
            handle.write(os.urandom(PIECE))
    return path


def sum_of(bulk: Path, total: int) -> str:
    with bulk.open("rb") as source:
        return hashlib.sha256(source.read(total)).hexdigest()


@pytest.fixture(scope="module")
def box(module_kata: Kata, bulk: Path) -> str:
    return module_kata.start("-v", f"{bulk.parent}:/bulk:ro", "busybox", "sleep", "1000")


@pytest.mark.core
def test_bulk_through_pipes_and_back(kata: Kata, bulk: Path, accelerator: str) -> None:
    """In at one end, out at the other, at the same time, through pipes."""
    total = EMULATED_BYTES if accelerator == "tcg" else BULK_BYTES
    command = ["run", "--rm", "-i", "--name", kata.name(), "busybox", "cat"]
    with kata.spawn(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        assert running.stderr is not None

        def feed(to: int) -> None:
            with bulk.open("rb") as source:
                for _ in range(total // PIECE):
                    os.write(to, source.read(PIECE))
            os.close(to)

        feeder = threading.Thread(target=feed, args=(os.dup(running.stdin.fileno()),))
        running.stdin.close()
        feeder.start()
        found, size = hashlib.sha256(), 0
        while piece := os.read(running.stdout.fileno(), PIECE):
            found.update(piece)
            size += len(piece)
        feeder.join()
        assert running.stderr.read() == b""
        assert running.wait(180) == 0
    assert (size, found.hexdigest()) == (total, sum_of(bulk, total))


def test_from_file_to_file(kata: Kata, box: str, tmp_path: Path) -> None:
    """Through an exec, with its streams redirected as a shell does."""
    data = os.urandom(10 << 20)
    (tmp_path / "in").write_bytes(data)
    with (tmp_path / "in").open("rb") as source, (tmp_path / "out").open("wb") as target:
        done = subprocess.run(
            kata_command("exec", "-i", box, "cat"), stdin=source, stdout=target, timeout=180, check=False
        )
    assert done.returncode == 0
    assert (tmp_path / "out").read_bytes() == data


def test_writer_whom_nobody_reads_stalls_and_loses_nothing(kata: Kata, box: str, bulk: Path) -> None:
    total = 64 << 20
    script = f"echo $$ >&2; exec head -c {total} /bulk/{bulk.name}"
    free_before = _free_guest_kib(kata, box)
    with kata.spawn("exec", box, "sh", "-c", script, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        writer = int(running.stderr.readline())
        _wait_until_stalled(kata, box, writer)
        supervisor = kata.listed(box)["supervisor_pid"]
        assert _resident_mib(supervisor) < 100
        assert _resident_mib(running.pid) < 100
        assert free_before - _free_guest_kib(kata, box) < 16 * 1024

        found, size = hashlib.sha256(), 0
        while piece := os.read(running.stdout.fileno(), PIECE):
            found.update(piece)
            size += len(piece)
        assert running.wait(180) == 0
        assert running.stderr.read() == b""
    assert (size, found.hexdigest()) == (total, sum_of(bulk, total))


def _free_guest_kib(kata: Kata, box: str) -> int:
    found = re.search(r"MemAvailable: +(\d+) kB", kata.ok("exec", box, "cat", "/proc/meminfo"))
    assert found
    return int(found[1])


def _wait_until_stalled(kata: Kata, box: str, writer: int) -> None:
    """Until the process `writer` has filled a pipe, and then written nothing for a while. Fails if it has ended."""
    seen = [-1, -2]

    def stalled() -> bool:
        out = kata.ok("exec", box, "grep", "wchar", f"/proc/{writer}/io")
        seen.append(int(out.split()[1]))
        return seen[-1] >= PIPE and seen[-1] == seen[-2]

    wait_for(stalled, f"the writer stalls: {seen}", limit_s=180, period_s=0.5)


def _resident_mib(pid: int) -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) >> 10


def test_slow_reader_of_stdin_holds_the_writer(kata: Kata, box: str) -> None:
    """The other direction: a command that does not read its input stops us, at pipes' worth of bytes."""
    script = "echo ready; read go < /tmp/go.fifo; sha256sum"
    kata.ok("exec", box, "mkfifo", "/tmp/go.fifo")
    with kata.spawn("exec", "-i", box, "sh", "-c", script, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        assert running.stdout.readline() == b"ready\n"
        data = os.urandom(32 << 20)
        os.set_blocking(running.stdin.fileno(), False)
        sent, last = 0, time.monotonic()
        while time.monotonic() - last < 1.5:
            try:
                sent += os.write(running.stdin.fileno(), data[sent : sent + PIECE])
                last = time.monotonic()
            except BlockingIOError:
                time.sleep(0.02)
        assert 0 < sent < 4 << 20, "it takes more than pipes and one message hold"
        assert _resident_mib(running.pid) < 100
        kata.ok("exec", box, "sh", "-c", "echo > /tmp/go.fifo")
        os.set_blocking(running.stdin.fileno(), True)
        running.stdin.write(data[sent:])
        running.stdin.close()
        assert running.stdout.read().split()[0].decode() == hashlib.sha256(data).hexdigest()
        assert running.wait(180) == 0


@pytest.mark.core
def test_half_closed_stdin(kata: Kata, box: str) -> None:
    """The end of our input ends the command's, while its output goes on."""
    script = "cat; sleep 0.3; echo after"
    with kata.spawn("exec", "-i", box, "sh", "-c", script, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        running.stdin.write(b"first\n")
        running.stdin.flush()
        assert running.stdout.readline() == b"first\n", "input comes through before its end"
        running.stdin.close()
        assert running.stdout.read() == b"after\n"
        assert running.wait(180) == 0


def test_command_that_ends_before_its_input(kata: Kata, box: str) -> None:
    """As `yes | head -n 1`: the rest of the input is nobody's."""
    with kata.spawn("exec", "-i", box, "head", "-n", "1", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        with pytest.raises(BrokenPipeError):
            _write_until_broken(running.stdin.fileno())
        assert running.stdout.read() == b"y\n"
        assert running.wait(180) == 0


def _write_until_broken(fd: int) -> None:
    while True:
        os.write(fd, b"y\n" * 4096)


def test_closed_output_ends_the_container(kata: Kata) -> None:
    """As `kata-runtime run busybox yes | head -n 1`."""
    command = ["run", "--rm", "--name", kata.name(), "busybox", "yes"]
    with kata.spawn(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        assert running.stdout.readline() == b"y\n"
        running.stdout.close()
        assert running.wait(180) == 141
        assert running.stderr.read() == b""


def test_closed_output_ends_an_exec(kata: Kata, box: str) -> None:
    with kata.spawn("exec", box, "yes", "exec-yes", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        assert running.stdout.readline() == b"exec-yes\n"
        running.stdout.close()
        assert running.wait(180) == 141
        assert running.stderr.read() == b""
    wait_for(lambda: "exec-yes" not in kata.ok("exec", box, "ps"), "the command ends with its reader")
