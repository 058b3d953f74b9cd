"""`kata-runtime` as an OCI engine drives it: a bundle, a --root of the test's own, and a process that reaps.

What `create` leaves behind becomes a child of this process, as of engines' helpers, since it is a subreaper.
"""

import contextlib
import ctypes
import json
import os
import select
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from katapod.oci.starter_spec import starter_spec
from kit.kata import RUN_PREFIX
from kit.templates import kata_command

__all__ = ["LIMIT_S", "ConsoleSocket", "OciRuntime", "Started", "make_rootfs", "oci_runtime", "reap"]

PR_SET_CHILD_SUBREAPER = 36
LIMIT_S = 240.0  # only against hanging
PROGRAMS = (
    "sh",
    "sleep",
    "cat",
    "echo",
    "id",
    "ls",
    "stty",
    "kill",
    "head",
    "wget",
    "httpd",
    "ip",
    "true",
    "yes",
    "test",
    "dd",
)


class Done(NamedTuple):
    code: int
    out: str
    err: str


class Started(NamedTuple):
    """A container that was created: its proxy, and the ends of its streams."""

    id: str
    pid: int
    stdin: int
    stdout: int
    stderr: int

    def read(self, fd: int | None = None) -> str:
        """All of standard output, or of another stream, until every writer has gone."""
        found = b""
        fd = self.stdout if fd is None else fd
        while True:
            ready, _, _ = select.select([fd], [], [], LIMIT_S)
            assert ready, f"the stream stays open; so far: {found!r}"
            try:
                piece = os.read(fd, 65536)
            except OSError:  # the terminal has hung up
                piece = b""
            if not piece:
                return found.decode(errors="replace")
            found += piece

    def read_until(self, text: str) -> str:
        found = b""
        while text.encode() not in found:
            ready, _, _ = select.select([self.stdout], [], [], LIMIT_S)
            assert ready, f"no {text!r} in {found!r}"
            piece = os.read(self.stdout, 65536)
            assert piece, f"no {text!r} in {found!r}"
            found += piece
        return found.decode(errors="replace")


def make_rootfs(place: Path) -> None:
    """A root file system with busybox, at a directory that is made."""
    (place / "bin").mkdir(parents=True)
    for name in ("proc", "dev", "sys", "tmp", "etc"):
        (place / name).mkdir()
    shutil.copy("/usr/bin/busybox", place / "bin/busybox")
    for name in PROGRAMS:
        (place / "bin" / name).symlink_to("busybox")


class OciRuntime:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.root = directory / "root"
        self.rootfs = directory / "rootfs"
        self.made: list[str] = []
        self._fds: list[int] = []
        self._bundles = 0
        make_rootfs(self.rootfs)

    def __call__(self, *words: str, input: str = "") -> Done:
        """Run a command to its end."""
        done = subprocess.run(
            self.command(*words), input=input, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def ok(self, *words: str, input: str = "") -> str:
        done = self(*words, input=input)
        assert (done.code, done.err) == (0, ""), f"{words}: {done}"
        return done.out

    def detach(self, *words: str) -> None:
        """Run a command that leaves something behind, which would hold pipes of ours open."""
        subprocess.run(
            self.command(*words), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=LIMIT_S, check=True
        )

    def command(self, *words: str) -> list[str]:
        return kata_command("--root", str(self.root), *words)

    def bundle(self, *args: str, terminal: bool = False, **changes: Any) -> Path:
        """One that runs `args`; `changes` are to keys of its spec."""
        self._bundles += 1
        place = self.directory / f"bundle{self._bundles}"
        place.mkdir()
        spec = starter_spec(rootless=False)
        spec["process"] |= {"args": list(args), "terminal": terminal}
        spec["root"] = {"path": str(self.rootfs)}
        for key, value in changes.items():
            spec[key] = spec.get(key, {}) | value if isinstance(value, dict) else value
        (place / "config.json").write_text(json.dumps(spec))
        return place

    def name(self) -> str:
        name = f"{RUN_PREFIX}oci{len(self.made)}-{self.directory.name[-8:]}"
        self.made.append(name)
        return name

    def create(self, *args: str, options: tuple[str, ...] = (), **changes: Any) -> Started:
        """Create a container with pipes for streams. What it inherits of us are the pipes alone."""
        name, bundle = self.name(), self.bundle(*args, **changes)
        stdin, stdout, stderr = os.pipe(), os.pipe(), os.pipe()
        self._fds += [stdin[1], stdout[0], stderr[0]]
        words = self.command("create", "--bundle", str(bundle), "--pid-file", str(bundle / "pid"), *options, name)
        try:
            done = subprocess.run(
                words, stdin=stdin[0], stdout=stdout[1], stderr=stderr[1], timeout=LIMIT_S, check=False
            )
        finally:
            for fd in (stdin[0], stdout[1], stderr[1]):
                os.close(fd)
        if done.returncode:
            raise AssertionError(f"create: {done.returncode}: {os.read(stderr[0], 65536).decode()}")
        return Started(name, int((bundle / "pid").read_text()), stdin[1], stdout[0], stderr[0])

    def start(self, *args: str, **changes: Any) -> Started:
        started = self.create(*args, **changes)
        self.ok("start", started.id)
        return started

    def state(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.ok("state", name))
        return found

    def supervisor(self, name: str) -> int:
        """The process that holds the container's VM, by its lock."""
        sandbox = json.loads((self.root / name / "state.json").read_text())["sandbox"]
        status = os.stat(self.root / f".{sandbox}" / "lock")
        wanted = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
        lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        return next(int(fields[4]) for fields in lines if len(fields) > 5 and fields[5] == wanted)

    def close_input(self, started: Started) -> None:
        os.close(started.stdin)
        self._fds.remove(started.stdin)

    def clean_up(self) -> None:
        left = [self("delete", "--force", name) for name in self.made]
        for fd in self._fds:
            os.close(fd)
        shutil.rmtree(self.directory)
        assert all(done.code == 0 for done in left), left


def reap(pid: int) -> int:
    """Wait for a proxy, as its engine does: the exit status, or 128 and the signal."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        time.sleep(0.01)
    raise AssertionError(f"process {pid} does not end")


@contextlib.contextmanager
def oci_runtime() -> Iterator[OciRuntime]:
    """One whose containers are removed with the block. This process is a subreaper meanwhile."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    directory = Path(f"/run/{RUN_PREFIX}{os.urandom(4).hex()}")
    directory.mkdir()
    runtime = OciRuntime(directory)
    try:
        yield runtime
    finally:
        runtime.clean_up()
        libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        for pid in _orphans():
            with contextlib.suppress(ChildProcessError):
                reap(pid)


def _orphans() -> list[int]:
    """Our children that were somebody else's: supervisors, and proxies that a test has not waited for."""
    found = []
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    for pid in children:
        with contextlib.suppress(OSError):
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            if name == "katapod-proxy" or (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"):
                found.append(int(pid))
    return found


class ConsoleSocket:
    """Where a command sends the master of a terminal."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        self._listener.settimeout(LIMIT_S)

    def take(self) -> int:
        """The master's descriptor, the caller's to close. Exactly one comes, beside the terminal's name."""
        connection, _ = self._listener.accept()
        with connection:
            name, fds, _, _ = socket.recv_fds(connection, 4096, 2)
        self._listener.close()
        assert name.startswith(b"/dev/pts/")
        assert len(fds) == 1
        return fds[0]
