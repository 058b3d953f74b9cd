"""The one way to other programs.

Arguments are lists, the environment is built up and never inherited whole, every wait has a limit, and a
failure carries the command (ready to paste), its status and the tail of what it said.
"""

import asyncio
import contextlib
import fcntl
import functools
import logging
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from msgspec import Struct

from katapod.host.own_mounts import enter_host_mounts, in_host_mounts
from katapod.host.patience import patient_timeout
from katapod.kernel.process import CLONE_NEWNET, die_with_parent, setns
from katapod.model.errors import KatapodError, MissingProgram
from katapod.tasks import finish, together

__all__ = [
    "CannotRun",
    "Child",
    "Completed",
    "ProcessFailed",
    "RunningProcess",
    "describe_status",
    "find_program",
    "open_netns",
    "run",
    "spawn",
    "stop_child",
]

log = logging.getLogger(__name__)

OUTPUT_MAX = 4 * 1024 * 1024  # bytes kept of each stream; a program that writes more has gone wrong
PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "XDG_RUNTIME_DIR")
STOP_GRACE_S = 2.0


class ProcessFailed(KatapodError):
    """A program ended with a status other than zero, or did not end in time."""

    def __init__(self, argv: Sequence[str], status: str, stderr: str, *, hint: str = "") -> None:
        tail = stderr.strip()[-2000:]
        super().__init__(f"{argv[0]} failed: {status}" + (f": {tail}" if tail else ""), hint=hint)
        self.command = shlex.join(argv)
        self.status = status
        self.stderr = stderr


class CannotRun(KatapodError):
    """The file is there, but the kernel does not execute it."""


class Completed(Struct, frozen=True):
    stdout: str
    stderr: str
    returncode: int


class RunningProcess(Protocol):
    """What of asyncio.subprocess.Process is used of a child."""

    @property
    def pid(self) -> int: ...

    @property
    def returncode(self) -> int | None: ...

    async def wait(self) -> int: ...


class Child(Struct, frozen=True):
    """A program that runs beside us."""

    argv: tuple[str, ...]
    process: RunningProcess

    @property
    def pid(self) -> int:
        return self.process.pid

    def describe_end(self) -> str:
        """How it ended, in words. Only after it has ended."""
        return describe_status(self.process.returncode)


def describe_status(returncode: int | None) -> str:
    if returncode is None:
        return "still running"
    if returncode < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-returncode).name}"
        return f"killed by signal {-returncode}"
    return f"exit status {returncode}"


def find_program(name: str, *, package: str) -> str:
    """Return the absolute path of `name`. Raises MissingProgram that names Debian's `package`."""
    path = shutil.which(name)
    if path is None and os.path.isabs(name) and os.path.exists(name):
        raise MissingProgram(f"cannot run {name}: it is not an executable file")
    if path is None:
        raise MissingProgram(
            f"cannot run {name}: it is not installed",
            hint=f"install the package {package}: apt-get install {package}",
        )
    return path


def _environment(extra: Mapping[str, str] | None) -> dict[str, str]:
    environment = {key: os.environ[key] for key in PASSED_ON if key in os.environ}
    environment.setdefault("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    environment["LC_ALL"] = "C.UTF-8"
    environment.update(extra or {})
    return environment


# long: the keywords are those of subprocess.run, as far as they are needed
async def run(
    argv: Sequence[str],
    *,
    timeout_s: float | None = 60.0,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    input: bytes | None = None,
    check: bool = True,
    netns: Path | None = None,
    executable: str | None = None,
    only_env: Mapping[str, str] | None = None,
    host_mounts: bool = False,
) -> Completed:
    """Run a program to its end: `executable`, or the first of `argv`; `only_env` is all of its environment.

    Raises MissingProgram if it is not there, CannotRun if it is no program, and ProcessFailed (with `check`)
    on a status other than zero or when `timeout_s` runs out. When we are cancelled the program and its
    process group are killed. With `netns` it runs in that network namespace; what does not open or is none raises
    CannotRun. With `host_mounts` it sees the host's mounts, as others see its own, and not those of this process.
    """
    log.debug("run: %s", shlex.join(argv))
    process = await _create_elsewhere(
        argv,
        netns,
        host_mounts=host_mounts,
        stdin=asyncio.subprocess.PIPE if input is not None else asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=dict(only_env) if only_env is not None else _environment(env),
        cwd=cwd,
        executable=executable,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(timeout_s):
            stdout, stderr, _ = await together(
                _read_bounded(process.stdout), _read_bounded(process.stderr), _feed(process.stdin, input)
            )
            returncode = await process.wait()
    except TimeoutError as exc:
        raise ProcessFailed(argv, f"no end within {timeout_s:g} s", "") from exc
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await finish(_end_of_killed(process))
    completed = Completed(stdout.decode(errors="replace"), stderr.decode(errors="replace"), returncode)
    if check and returncode != 0:
        raise ProcessFailed(argv, describe_status(returncode), completed.stderr or completed.stdout)
    return completed


async def _create_elsewhere(
    argv: Sequence[str], netns: Path | None, *, host_mounts: bool, **how: Any
) -> asyncio.subprocess.Process:
    """In the network namespace `netns`, with the host's mounts, or in our own. Raises MissingProgram, CannotRun."""
    entered = open_netns(argv, netns)
    elsewhere = entered is not None or host_mounts
    before = functools.partial(_before_run, entered, host_mounts) if elsewhere else None
    try:
        return await _create(*argv, preexec_fn=before, **how)
    except subprocess.SubprocessError as exc:  # of preexec_fn
        raise _no_netns(argv, netns, "it is not a network namespace") from exc
    except FileNotFoundError as exc:
        raise MissingProgram(f"cannot run {argv[0]}: {exc.strerror}") from exc
    except OSError as exc:  # not a program: a configuration may name any file
        raise CannotRun(f"cannot run {argv[0]}: {exc.strerror}") from exc
    finally:
        if entered is not None:
            os.close(entered)


async def _create(*argv: str, **how: Any) -> asyncio.subprocess.Process:
    """asyncio.create_subprocess_exec, which is not cut short: it would take the program's status away from its own
    watcher, which then warns of an unknown process."""
    created: list[asyncio.subprocess.Process] = []

    async def create() -> None:
        created.append(await asyncio.create_subprocess_exec(*argv, **how))

    try:
        await finish(create(), name=f"create {argv[0]}")
    except asyncio.CancelledError:
        for process in created:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await finish(_end_of_killed(process))
        raise
    return created[0]


async def _end_of_killed(process: asyncio.subprocess.Process) -> None:
    """asyncio tells the end of a program after that of all its pipes, and sees that only where they are read on."""
    if process.stdin is not None:
        pipe = process.stdin.transport
        if not pipe.is_closing() or pipe.get_write_buffer_size() > 0:  # the abort of a closed one raises
            pipe.abort()
    outputs = [stream for stream in (process.stdout, process.stderr) if stream is not None]
    try:
        async with asyncio.timeout(STOP_GRACE_S):
            await together(process.wait(), *map(_read_bounded, outputs))
    except TimeoutError:  # a descendant that has left the process group has them open
        process._transport.close()  # type: ignore[attr-defined]  # there is no other way
        await process.wait()


def open_netns(argv: Sequence[str], netns: Path | None) -> int | None:
    """The descriptor is the caller's. Raises CannotRun."""
    if netns is None:
        return None
    try:
        return in_host_mounts(lambda: os.open(netns, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as exc:
        raise _no_netns(argv, netns, exc.strerror or str(exc)) from exc


def _no_netns(argv: Sequence[str], netns: Path | None, cause: str) -> CannotRun:
    return CannotRun(f"cannot run {argv[0]} in the network namespace {netns}: {cause}")


async def _read_bounded(stream: asyncio.StreamReader | None) -> bytes:
    assert stream is not None
    kept = bytearray()
    while chunk := await stream.read(65536):
        kept += chunk[: max(0, OUTPUT_MAX - len(kept))]
    return bytes(kept)


async def _feed(stream: asyncio.StreamWriter | None, data: bytes | None) -> None:
    if stream is None:
        return
    stream.write(data or b"")
    stream.close()  # once all is written
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        await stream.wait_closed()  # asyncio would log the error of a pipe that nobody awaits as never retrieved


async def spawn(
    argv: Sequence[str],
    *,
    output: BinaryIO | int,
    pass_fds: Sequence[int] = (),
    env: Mapping[str, str] | None = None,
    fds_as: Mapping[int, int] | None = None,
    netns: Path | None = None,
    before_exec: Callable[[], None] | None = None,
) -> Child:
    """Start a program that lives beside us and dies with us.

    It inherits `pass_fds` under their own numbers, and those of `fds_as`: number in the program -> ours.
    Raises MissingProgram, CannotRun.

    Its streams are /dev/null and `output` (a bounded sink of the caller). It gets SIGKILL when this
    process dies, however that happens: the child asks the kernel for it before it becomes the program, and
    looks whether it came too late, which an outer program such as setpriv(1) cannot. A session of its own
    keeps the terminal's Ctrl-C from reaching it. With `netns` it runs in that network namespace; what does not
    open or is none raises CannotRun. `before_exec` is called in the child at last, and raises nothing.
    """
    log.debug("spawn: %s", shlex.join(argv))
    entered = open_netns(argv, netns)
    moved = fds_as or {}
    # out of the way of the numbers that they are to get
    copies = {number: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 64) for number, fd in moved.items()}
    try:
        process = await _create(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=_environment(env),
            pass_fds=(*pass_fds, *moved),
            start_new_session=True,
            preexec_fn=functools.partial(_before_exec, os.getpid(), copies, entered, before_exec),
        )
    except FileNotFoundError as exc:
        raise MissingProgram(f"cannot run {argv[0]}: {exc.strerror}") from exc
    except OSError as exc:
        raise CannotRun(f"cannot run {argv[0]}: {exc.strerror}") from exc
    except subprocess.SubprocessError as exc:  # of preexec_fn
        raise _no_netns(argv, netns, "it is not a network namespace") from exc
    finally:
        for fd in (*copies.values(), *([entered] if entered is not None else [])):
            os.close(fd)
    return Child(tuple(argv), process)


def _before_run(netns: int | None, host_mounts: bool) -> None:
    if netns is not None:
        setns(netns, CLONE_NEWNET)
    if host_mounts:
        enter_host_mounts()


def _before_exec(parent_pid: int, fds: Mapping[int, int], netns: int | None, more: Callable[[], None] | None) -> None:
    die_with_parent(parent_pid)
    for number, fd in fds.items():
        os.dup2(fd, number)
    if netns is not None:
        setns(netns, CLONE_NEWNET)
    if more is not None:
        more()


async def stop_child(child: Child, *, grace_s: float = STOP_GRACE_S, soft: bool = True) -> bool:
    """Make sure that `child` has ended: SIGTERM, a wait, SIGKILL. Returns whether it ended gracefully. Idempotent."""
    process = child.process
    if process.returncode is not None:
        return True
    if soft:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGTERM)
        try:
            async with patient_timeout(grace_s, child):
                await process.wait()
                return True
        except TimeoutError:
            log.warning("%s did not end within %g s and is killed", child.argv[0], grace_s)
    with contextlib.suppress(ProcessLookupError):
        # not process.kill(): it looks first whether the child has ended, and takes its status from asyncio's watcher
        os.kill(process.pid, signal.SIGKILL)
    await process.wait()
    return False
