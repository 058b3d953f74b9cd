"""Starts commands and takes the times of their output and of their end.

Commands get pipes as standard input and output: runsc changes the owner of what it is given, and must not be given
the host's /dev/null. They run in sessions of their own, so that Ctrl-C reaches the benchmark alone, which then ends
them in order. The loop waits for output and deaths at once; nothing is polled.
"""

import contextlib
import os
import selectors
import shlex
import signal
import subprocess
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO

from bench.contestants import Contestant

__all__ = ["BenchError", "Outcome", "detached", "execute", "quietly", "run_at_once", "run_containers", "run_one"]

LIMIT_S = 300.0
GRACE_S = 20.0  # for a runtime to clean up after SIGTERM


class BenchError(Exception):
    """A command of a contestant did not do what it should."""


@dataclass(slots=True)
class Outcome:
    """What became of one command. Times are seconds since its own start."""

    argv: list[str]
    began: float  # on the monotonic clock
    lines: list[tuple[float, str]] = field(default_factory=list)
    ended_s: float | None = None
    status: int | None = None
    errors: str = ""  # the end of its standard error

    @property
    def command(self) -> str:
        """For messages: its begin, on one line."""
        return textwrap.shorten(shlex.join(self.argv), 160, placeholder=" ...")

    @property
    def good(self) -> bool:
        return self.status == 0 and bool(self.lines)

    @property
    def first_s(self) -> float:
        """Until the first line. Raises BenchError if there is none."""
        self.require_good()
        return self.lines[0][0]

    @property
    def end_s(self) -> float:
        if self.ended_s is None:
            raise BenchError(f"{self.command}: did not end within {LIMIT_S:.0f} s")
        return self.ended_s

    def until(self, text: str) -> float:
        """Until this line of output. Raises BenchError if it never came."""
        for taken, line in self.lines:
            if line == text:
                return taken
        raise BenchError(f"{self.command}: never wrote {text!r}: {self.why()}")

    def why(self) -> str:
        said = self.errors.strip().splitlines() or [line for _, line in self.lines]
        return "; ".join([f"status {self.status}", *said[-3:]])

    def require_good(self) -> None:
        if not self.good:
            raise BenchError(f"{self.command}: {self.why()}")


@dataclass(slots=True)
class _Started:
    process: subprocess.Popen[bytes]
    outcome: Outcome
    errors: IO[bytes]
    pidfd: int
    rest: bytes = b""

    def take(self) -> bool:
        """Read what is there; False at the end of output, or if there is nothing now."""
        assert self.process.stdout is not None
        try:
            data = os.read(self.process.stdout.fileno(), 65536)
        except BlockingIOError:
            return False
        now = time.monotonic() - self.outcome.began
        if self.outcome.ended_s is not None:
            now = min(now, self.outcome.ended_s)  # its death was noticed before its last words
        *whole, self.rest = (self.rest + data).split(b"\n")
        if not data and self.rest:
            whole, self.rest = [self.rest], b""
        self.outcome.lines += [(now, line.rstrip(b"\r").decode(errors="replace")) for line in whole]
        return bool(data)

    def finish(self) -> None:
        """It has ended. What it left running may still hold its output, which is then not waited for."""
        self.outcome.ended_s = time.monotonic() - self.outcome.began
        self.outcome.status = self.process.wait()
        while self.take():
            pass


def _start(argv: list[str], stack: contextlib.ExitStack) -> _Started:
    errors = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - closed by the stack
    began = time.monotonic()
    try:
        process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
        )
    except OSError as error:
        raise BenchError(f"cannot start {argv[0]}: {error.strerror}") from error
    stack.callback(_end, process)
    assert process.stdin is not None
    assert process.stdout is not None
    stack.callback(process.stdout.close)
    process.stdin.close()
    os.set_blocking(process.stdout.fileno(), False)
    pidfd = os.pidfd_open(process.pid)
    stack.callback(os.close, pidfd)
    return _Started(process, Outcome(argv, began), errors, pidfd)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask, wait, kill: a runtime that is asked takes its container along."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_at_once(commands: Sequence[list[str]], limit_s: float = LIMIT_S, lanes: int | None = None) -> list[Outcome]:
    """Run all, at most `lanes` (default: all) at a time, and wait until they have ended.

    Who does not end within the limit, which is for all together, is ended, and has no `ended_s`.
    """
    waiting = list(reversed(commands))
    started: list[_Started] = []
    running: set[int] = set()  # their pidfds
    deadline = time.monotonic() + limit_s
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        while (waiting or running) and (left := deadline - time.monotonic()) > 0:
            while waiting and len(running) < (lanes or len(commands)):
                one = _start(waiting.pop(), stack)
                started.append(one)
                running.add(one.pidfd)
                assert one.process.stdout is not None
                selector.register(one.process.stdout, selectors.EVENT_READ, one)
                selector.register(one.pidfd, selectors.EVENT_READ, one)
            for key, _ in selector.select(left):
                one = key.data
                if key.fd in running:
                    one.finish()
                    running.discard(key.fd)
                elif one.take():
                    continue
                selector.unregister(key.fileobj)
        for one in started:
            one.errors.seek(0)
            one.outcome.errors = one.errors.read()[-4000:].decode(errors="replace")
        return [one.outcome for one in started] + [Outcome(argv, deadline) for argv in reversed(waiting)]


def execute(argv: list[str], limit_s: float = LIMIT_S) -> Outcome:
    """One command that must end well, output or not. Raises BenchError."""
    (outcome,) = run_at_once([argv], limit_s)
    if outcome.status != 0:
        raise BenchError(f"{outcome.command}: {outcome.why()}")
    return outcome


def quietly(argv: list[str]) -> None:
    """A command whose failure is no news: removal of what may be gone."""
    with contextlib.suppress(BenchError):
        run_at_once([argv], GRACE_S)


@contextlib.contextmanager
def _names(contestant: Contestant, count: int) -> Iterator[list[str]]:
    """Container ids; what goes wrong inside removes all of them."""
    names = [contestant.new_id() for _ in range(count)]
    try:
        yield names
    except BaseException:
        for name in names:
            quietly(contestant.delete(name))
        raise


def run_containers(
    contestant: Contestant, command: Sequence[str], count: int, lanes: int | None = None
) -> list[Outcome]:
    """So many containers, each until its end; all at once or in lanes. Failures are in the outcomes, and cleaned up."""
    with _names(contestant, count) as names:
        outcomes = run_at_once([contestant.run(name, command) for name in names], lanes=lanes)
        for name, outcome in zip(names, outcomes, strict=True):
            if outcome.status != 0:
                quietly(contestant.delete(name))
    return outcomes


def run_one(contestant: Contestant, command: Sequence[str]) -> Outcome:
    """One container until its end. Raises BenchError unless it wrote something and ended with 0."""
    (outcome,) = run_containers(contestant, command, 1)
    outcome.require_good()
    outcome.end_s  # noqa: B018 - raises if it did not end
    return outcome


@contextlib.contextmanager
def detached(contestant: Contestant, command: Sequence[str]) -> Iterator[str]:
    """A container in the background, by id, until the end of the block."""
    with _names(contestant, 1) as (name,), contextlib.ExitStack() as stack:
        one = _start(contestant.run_detached(name, command), stack)
        try:
            status = one.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired as error:
            raise BenchError(f"{one.outcome.command}: not running after {LIMIT_S:.0f} s") from error
        if status != 0:
            one.errors.seek(0)
            one.outcome.status, one.outcome.errors = status, one.errors.read().decode(errors="replace")
            raise BenchError(f"{one.outcome.command}: {one.outcome.why()}")
        yield name
        quietly(contestant.delete(name))
