"""Run `kata-runtime` as its users do: a process with a time limit, its status and its two streams."""

import contextlib
import itertools
import json
import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from kit.templates import KATA, kata_command

__all__ = ["AS_OTHER_USER", "KATA", "RUN_PREFIX", "SHARED_HOST", "Kata", "Result", "wait_for"]

RUN_PREFIX = f"t{os.getpid()}-"
"""All container names of this test run begin so: what is left of them can be told from others'."""

SHARED_HOST = bool(os.environ.get("KATAPOD_TESTS_SHARED_HOST") or os.environ.get("PYTEST_XDIST_WORKER"))
"""Other work on the machine, such as a second test run: then only what carries our names can be told to be ours."""

OTHERS = re.compile(
    rb"kata-runtime: (WARNING: (?!%b)\S+ was left behind: |using (tcg|uml|kvm): )" % RUN_PREFIX.encode()
)
STREAM_SHOWN = 4000  # characters of a stream in the transcript of a failed test
REST = 2.0  # of waiting between two looks, in times of what a look takes
_numbers = itertools.count(1)


AS_OTHER_USER = (
    *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"),
    *("--inh-caps=-all,+dac_read_search", "--ambient-caps=+dac_read_search"),
)
"""Put before a command: another user than root, who may read everything, since the sources may lie in /root."""


class Result(NamedTuple):
    code: int
    stdout: str
    stderr: str


class Kata:
    """The command line under test. Remembers what was run, and the containers to remove at the end."""

    def __init__(self, scope: str) -> None:
        self._scope = re.sub(r"[^a-zA-Z0-9]+", "-", scope.removeprefix("test_")).strip("-")[:32]
        self._started: list[str] = []
        self._transcript: list[str] = []

    def name(self) -> str:
        """A container name that nothing else has."""
        return f"{RUN_PREFIX}{next(_numbers)}-{self._scope}"

    def __call__(self, *args: str, input: str | bytes | None = None, timeout: float = 240) -> Result:
        """Run `kata-runtime ARGS` to its end. Raises TimeoutExpired; then it has been killed."""
        code, out, err = self.binary(*args, input=input.encode() if isinstance(input, str) else input, timeout=timeout)
        return Result(code, out.decode(errors="replace"), err.decode(errors="replace"))

    def binary(self, *args: str, input: bytes | None = None, timeout: float = 240) -> tuple[int, bytes, bytes]:
        started = time.monotonic()
        try:
            done = subprocess.run(
                kata_command(*args),
                input=input,
                stdin=subprocess.DEVNULL if input is None else None,
                capture_output=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as exc:
            self._note(args, "no end", time.monotonic() - started, exc.stdout or b"", exc.stderr or b"")
            raise
        self._note(args, str(done.returncode), time.monotonic() - started, done.stdout, done.stderr)
        err = done.stderr
        if SHARED_HOST:  # every `run` tidies up after others that were killed, and says so
            err = b"".join(line for line in err.splitlines(keepends=True) if not OTHERS.match(line))
        return done.returncode, done.stdout, err

    def ok(self, *args: str, input: str | bytes | None = None, timeout: float = 240) -> str:
        """Run `kata-runtime ARGS`, which has to succeed and to say nothing on stderr; return its stdout."""
        result = self(*args, input=input, timeout=timeout)
        assert result.code == 0, f"kata-runtime {shlex.join(args)}: {result}"
        assert result.stderr == "", f"kata-runtime {shlex.join(args)}: {result}"
        return result.stdout

    def run(self, *args: str, input: str | bytes | None = None, timeout: float = 240) -> Result:
        """`run --rm --name NEW ARGS`."""
        return self("run", "--rm", "--name", self.name(), *args, input=input, timeout=timeout)

    def remove_later(self, name: str) -> str:
        """Have a container of that name removed at the end of the test, if there is one; returns the name."""
        self._started.append(name)
        return name

    def start(self, *args: str) -> str:
        """`run -d --name NEW ARGS`, removed at the end of the test; returns the name."""
        name = self.remove_later(self.name())
        assert self.ok("run", "-d", "--name", name, *args) == f"{name}\n"
        return name

    @contextlib.contextmanager
    def spawn(self, *args: str, **kwargs: Any) -> Iterator[subprocess.Popen[bytes]]:
        """`kata-runtime ARGS` while the block runs; what still runs at its end is killed."""
        self._transcript.append(f"$ kata-runtime {shlex.join(args)} &\n")
        with subprocess.Popen(kata_command(*args), **kwargs) as process:
            try:
                yield process
            finally:
                if process.poll() is None:
                    process.kill()

    def listed(self, name: str) -> dict[str, Any]:
        """The entry of a container in `list --json`; fails if there is none."""
        rows: list[dict[str, Any]] = json.loads(self.ok("list", "--json"))
        found = [row for row in rows if row["name"] == name]
        assert len(found) == 1, f"{name} in {rows}"
        return found[0]

    def let_end(self, name: str, path: str) -> None:
        """Make the file that a container waits for with its last step. Who makes it may be killed with the container
        before it has ended."""
        self("exec", name, "touch", path)

    def remove_started(self) -> None:
        """Remove what `start` made, running or not: all by one process, whose start takes longer than a removal."""
        if self._started:
            names = list(reversed(self._started))
            self._started.clear()
            result = self("delete", "--force", "--volumes", *names)
            assert result.code == 0, f"cannot remove {names}: {result}"

    @property
    def transcript(self) -> str:
        """All that was run and said, for a failed test."""
        return "\n".join(self._transcript)

    def _note(self, args: Sequence[str], status: str, seconds: float, out: bytes, err: bytes) -> None:
        lines = [f"$ kata-runtime {shlex.join(args)}\nstatus {status} after {seconds:.2f} s"]
        for stream, data in (("stdout", out), ("stderr", err)):
            if data:
                lines.append(f"{stream}, {len(data)} bytes:\n{data[-STREAM_SHOWN:].decode(errors='replace')}")
        self._transcript.append("\n".join(lines) + "\n")


def wait_for(condition: Any, what: str, limit_s: float = 180.0, period_s: float = 0.05) -> Any:
    """Poll `condition` until it is true, and return its value; fail with `what` after `limit_s`.

    One that runs a program is asked less often: what is waited for needs the CPU as well.
    """
    deadline = time.monotonic() + limit_s
    while True:
        began = time.monotonic()
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # of what is not there yet, or no more
            if value := condition():
                return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {limit_s:g} s: {what}")
        time.sleep(max(period_s, REST * (time.monotonic() - began)))
